"""Programs with costs that can be counted by hand, compiled for TPUs on a machine without one.
`python tpu_programs.py FOLDER SCHEDULES` makes a folder for each, with its HLO (or the error of one
that does not fit) and what libtpu dumped into SCHEDULES meanwhile. It runs in its own process,
because libtpu reads its settings when jax is imported."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DEVICES = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
ONE, EIGHT = Mesh(DEVICES[:1], ("parts",)), Mesh(np.array(DEVICES).reshape(2, 4), ("pair", "parts"))
HALF, LOOPS = jnp.bfloat16, 7


def nested(x: jax.Array, weights: jax.Array, outer: int) -> jax.Array:
    """A product with each of the weights, `outer` times."""
    once = partial(lax.scan, lambda x, weight: (jnp.tanh(x @ weight), None), xs=weights)
    return lax.scan(lambda x, _: (once(x)[0], None), x, length=outer)[0]


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def repeat(collective: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """A collective over the four parts, `LOOPS` times in a loop that computes a new operand."""

    def once(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        y = collective(jnp.sin(x))
        return x + jnp.sum(y) * jnp.ones_like(x), None

    spec = PartitionSpec("parts")
    return jax.shard_map(
        lambda x: lax.scan(once, x, length=LOOPS)[0], mesh=EIGHT, in_specs=spec, out_specs=spec
    )(x)


def beside(x: jax.Array) -> jax.Array:
    """Two exchanges, and products that do not depend on them."""
    there = lax.all_to_all(x, "parts", 1, 0, tiled=True)
    return lax.all_to_all(there, "parts", 0, 1, tiled=True) + jnp.tanh(x @ (x.T @ x))


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """[heads, rows, 64] in tiles of 512 x 512."""
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.FullMask((q.shape[1], k.shape[1]))] * len(q)
    )
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        mask, block_sizes=splash_attention_kernel.BlockSizes(512, 512, 512)
    )
    whole = (PartitionSpec(),) * 3
    return jax.shard_map(kernel, mesh=ONE, in_specs=whole, out_specs=whole[0], check_vma=False)(
        q, k, v
    )


def attention(q: int, k: int) -> tuple:
    return ONE, attend, [(4, q, 64), (4, k, 64), (4, k, 64)]


def parts(collective: Callable[[jax.Array], jax.Array]) -> tuple:
    return EIGHT, partial(repeat, collective), [(4096, 512)]


PROGRAMS = {
    **{
        f"nested-{outer}": (ONE, partial(nested, outer=outer), [(256, 512), (5, 512, 512)])
        for outer in (3, 6, 12)
    },
    "convolution": (ONE, convolve, [(4, 12, 8, 32), (3, 3, 32, 64)]),  # a larger one takes 8 s
    "all-to-all": parts(lambda x: lax.all_to_all(x, "parts", 1, 0, tiled=True)),
    "all-to-all-beside-products": parts(beside),
    "all-gather": parts(lambda x: lax.all_gather(x, "parts", tiled=True)),
    "reduce-scatter": parts(lambda x: lax.psum_scatter(x, "parts", tiled=True)),
    "all-reduce": parts(lambda x: lax.psum(x, "parts")),
    "collective-permute": parts(
        lambda x: lax.ppermute(x, "parts", [(i, (i + 1) % 4) for i in range(4)])
    ),
    **{
        f"attention-{q}-{k}": attention(q, k) for q, k in ((1024, 1024), (2048, 1024), (1024, 2048))
    },
    "too-large": (ONE, lambda x: x @ x.T, [(2**17, 128)]),  # 32 GiB of results
}


def main(folder: Path, schedules: Path) -> None:
    for name, (mesh, function, shapes) in PROGRAMS.items():
        place = NamedSharding(mesh, PartitionSpec("parts") if mesh is EIGHT else PartitionSpec())
        arguments = [jax.ShapeDtypeStruct(shape, HALF, sharding=place) for shape in shapes]
        try:
            lowered = jax.jit(function).lower(*arguments)
            text = lowered.compile({"xla_tpu_enable_async_all_to_all": True}).as_text()
        except jax.errors.JaxRuntimeError as error:
            text = str(error)
        (folder / name).mkdir()
        (folder / name / "program.txt").write_text(text)
        for path in schedules.iterdir():
            path.rename(folder / name / path.name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
