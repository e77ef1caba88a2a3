"""Evaluation of a VAE layer strip by strip: intermediate values exist for one strip of rows at a
time. The result is exact, because every strip includes the halo rows of its neighbours that a 3x3
convolution reads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Strip(NamedTuple):
    """One of `count` equal strips of rows. A single strip is the whole picture: it has no halo, and
    its convolutions pad with zeros themselves, which is also the form that the SPMD partitioner
    turns into an exchange of halo rows between devices."""

    index: Any
    count: int

    @property
    def halo(self) -> int:
        """Rows of each neighbour that the strip includes."""
        return 1 if self.count > 1 else 0

    @property
    def padding(self) -> tuple[int, int]:
        """Rows of zeros that a 3x3 convolution has to add."""
        return 1 - self.halo, 1 - self.halo

    def own(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h2 w c"]:
        """The strip's rows of x, without halo."""
        if self.count == 1:
            return x
        size = x.shape[2] // self.count
        return lax.dynamic_slice_in_dim(x, self.index * size, size, axis=2)

    def with_halo(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h2 w c"]:
        """The strip's rows of x and its halo; halo rows outside of the picture hold any row."""
        if self.count == 1:
            return x
        size = x.shape[2] // self.count
        first, last = self.index * size, (self.index + 1) * size
        above, below = (
            lax.dynamic_slice_in_dim(x, row, 1, axis=2) for row in (jnp.maximum(first - 1, 0), last)
        )
        return jnp.concatenate([above, self.own(x), below], axis=2)

    def zero_outside(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        """x, a strip with its halo, with zeros in the halo rows outside of the picture."""
        if self.count == 1:
            return x
        row = jnp.arange(x.shape[2])[:, None, None]
        above = (self.index == 0) & (row == 0)
        below = (self.index == self.count - 1) & (row == x.shape[2] - 1)
        return jnp.where(above | below, 0, x)

    def without_halo(
        self, x: Float[Array, "b f h w c"], halo: int = 1
    ) -> Float[Array, "b f h2 w c"]:
        """x, a strip with its halo, without its first and last `halo` rows."""
        return x if self.count == 1 else x[:, :, halo : x.shape[2] - halo]


def in_strips(layer: Callable[[Strip], Any], count: int) -> Any:
    """Runs `layer`, which returns a pytree of one strip's rows, over `count` strips in turn, and
    returns the whole tensors."""
    if count == 1:
        return layer(Strip(0, 1))

    def write(results: Any, index: Any) -> tuple[Any, None]:
        def put(whole: Array, rows: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(whole, rows, index * rows.shape[2], axis=2)

        return jax.tree.map(put, results, layer(Strip(index, count))), None

    def empty(rows: Any) -> Array:
        return jnp.zeros((*rows.shape[:2], count * rows.shape[2], *rows.shape[3:]), rows.dtype)

    shapes = jax.eval_shape(lambda: layer(Strip(jnp.int32(0), count)))
    return lax.scan(write, jax.tree.map(empty, shapes), jnp.arange(count))[0]


def strip_counts(strips: int, rows: int) -> Callable[[int], int]:
    """The number of strips at every resolution, given as its rows, where the finest one has `rows`
    and `strips`. Coarser ones have fewer strips, of about as many values each; a strip is a whole
    number of latent rows. Raises ValueError where `strips` doesn't divide the latent rows."""
    latent_rows = rows // 8
    if latent_rows % strips:
        raise ValueError(f"strips must divide the {latent_rows} latent rows: got {strips}")

    def count(coarser: int) -> int:
        most = max(1, strips * coarser**2 // rows**2)
        return max(count for count in range(1, most + 1) if latent_rows % count == 0)

    return count
