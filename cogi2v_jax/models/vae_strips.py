"""A layer over strips of rows, one after another: what lies between its input and its output then
exists for one strip at a time. Exact, since every strip sees the rows of its neighbours that a 3x3
convolution reads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Strip(NamedTuple):
    """One of `count` equal strips. A single one is the whole picture: nothing is cut, and its
    convolutions bring their own zeros, which is also the form that a partitioner turns into an
    exchange of halo rows between devices."""

    index: Any
    count: int

    @property
    def halo(self) -> int:
        """Rows that it has from each neighbour."""
        return 1 if self.count > 1 else 0

    @property
    def padding(self) -> tuple[int, int]:
        """Rows of zeros that a 3x3 convolution has to add."""
        return 1 - self.halo, 1 - self.halo

    def rows(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h2 w c"]:
        """The strip's own rows."""
        size = x.shape[2] // self.count
        return (
            x if self.count == 1 else lax.dynamic_slice_in_dim(x, self.index * size, size, axis=2)
        )

    def wide(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h2 w c"]:
        """The strip's rows between those of its neighbours; beyond the picture, any row."""
        if self.count == 1:
            return x
        first, last = (
            self.index * (x.shape[2] // self.count),
            (self.index + 1) * (x.shape[2] // self.count),
        )
        above, below = (
            lax.dynamic_slice_in_dim(x, row, 1, axis=2) for row in (jnp.maximum(first - 1, 0), last)
        )
        return jnp.concatenate([above, self.rows(x), below], axis=2)

    def blank(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        """Zeros in the rows of a wide strip that lie beyond the picture."""
        if self.count == 1:
            return x
        row = jnp.arange(x.shape[2])[:, None, None]
        above, below = (
            (self.index == 0) & (row == 0),
            (self.index == self.count - 1) & (row == x.shape[2] - 1),
        )
        return jnp.where(above | below, 0, x)

    def narrow(self, x: Float[Array, "b f h w c"], halo: int = 1) -> Float[Array, "b f h2 w c"]:
        """A wide strip without its outer rows, `halo` of them on each side."""
        return x if self.count == 1 else x[:, :, halo : x.shape[2] - halo]


def in_strips(layer: Callable[[Strip], Any], count: int) -> Any:
    """`layer` gives its results' rows for a strip, as any tree of arrays; here they come
    together."""
    if count == 1:
        return layer(Strip(0, 1))

    def one(wholes: Any, index: Any) -> tuple[Any, None]:
        def put(whole: Array, rows: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(whole, rows, index * rows.shape[2], axis=2)

        return jax.tree.map(put, wholes, layer(Strip(index, count))), None

    shapes = jax.eval_shape(lambda: layer(Strip(jnp.int32(0), count)))
    wholes = jax.tree.map(
        lambda part: jnp.zeros(
            (*part.shape[:2], count * part.shape[2], *part.shape[3:]), part.dtype
        ),
        shapes,
    )
    return lax.scan(one, wholes, jnp.arange(count))[0]
