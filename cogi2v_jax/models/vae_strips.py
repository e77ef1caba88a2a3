"""Evaluation of a VAE layer strip by strip: intermediate values exist for one strip of rows at a
time. The result is exact, because every strip includes the halo rows of its neighbours that a 3x3
convolution reads."""

from collections.abc import Callable, Sequence
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

    def with_halo(
        self, x: Float[Array, "b f h w c"], above: Float[Array, "b f 1 w c"] | None = None
    ) -> Float[Array, "b f h2 w c"]:
        """The strip's rows of x and its halo, of which `above` replaces the first row; halo rows
        outside of the picture hold any row."""
        if self.count == 1:
            return x
        size = x.shape[2] // self.count
        if above is None:
            first = jnp.maximum(self.index * size - 1, 0)
            above = lax.dynamic_slice_in_dim(x, first, 1, axis=2)
        below = lax.dynamic_slice_in_dim(x, (self.index + 1) * size, 1, axis=2)
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


def in_strips(layer: Callable[..., Sequence[Any]], count: int, *tensors: Array | None) -> list[Any]:
    """Runs `layer` over `count` strips in turn. Given a strip and its rows of all tensors, with
    halo, it returns the rows of all results, without. Returns whole results. A result overwrites
    the tensor in its place if their shapes are equal. Where it is None, that tensor is returned."""

    def compute(index: Any, inputs: Sequence[Any], above: Sequence[Any]) -> list[Any]:
        strip = Strip(index, count)
        return list(layer(strip, *jax.tree.map(strip.with_halo, inputs, above)))

    def write(carry: Any, index: Any) -> tuple[Any, None]:
        results, above = carry
        inputs = [results[i] if i in reused else tensor for i, tensor in enumerate(tensors)]
        # This strip overwrites its last rows, which are the next one's halo.
        last = jax.tree.map(lambda x: Strip(index, count).own(x)[:, :, -1:], inputs)

        def put(whole: Array, rows: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(whole, rows, index * rows.shape[2], axis=2)

        return (jax.tree.map(put, results, compute(index, inputs, above)), last), None

    def allocate(rows: Any) -> Array:
        return jnp.zeros((*rows.shape[:2], count * rows.shape[2], *rows.shape[3:]), rows.dtype)

    def fits(tensor: Array | None, result: Array | None) -> bool:
        return tensor is not None and result is not None and tensor.shape == result.shape

    if count == 1:
        results = layer(Strip(0, 1), *tensors)
    else:
        above = jax.tree.map(lambda x: x[:, :, :1], list(tensors))
        empty = jax.tree.map(allocate, jax.eval_shape(compute, jnp.int32(0), list(tensors), above))
        reused = {i for i, fit in enumerate(map(fits, tensors, empty)) if fit}
        results = [tensors[i] if i in reused else result for i, result in enumerate(empty)]
        (results, _), _ = lax.scan(write, (results, above), jnp.arange(count))
    return [tensors[i] if result is None else result for i, result in enumerate(results)]


def strip_counts(strips: int, rows: int, ratio: int) -> Callable[[int], int]:
    """The number of strips at every resolution, given as its rows, where the finest one has `rows`,
    `ratio` times those of the latents, and `strips`. Coarser ones have fewer strips, of about as
    many values each; a strip is a whole number of latent rows. Raises ValueError where `strips`
    doesn't divide the latent rows."""
    latent_rows = rows // ratio
    if latent_rows % strips:
        raise ValueError(f"strips must divide the {latent_rows} latent rows: got {strips}")

    def count(coarser: int) -> int:
        most = max(1, strips * coarser**2 // rows**2)
        return max(count for count in range(1, most + 1) if latent_rows % count == 0)

    return count
