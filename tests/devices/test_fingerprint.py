"""What decides an executable changes its fingerprint, what doesn't doesn't, and what no other
process could name has none."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from cogi2v_jax.devices import fingerprint
from cogi2v_jax.devices.fingerprint import UnnamedError, describe, devices
from cogi2v_jax.models import attention, layers
from cogi2v_jax.sampling import schedule

AXES = ("data", "pair", "context")


def print_of(args=(), static=None, options=None, function=layers.silu) -> str | None:
    return fingerprint.fingerprint(function, args, static or {}, options or {})


def mesh(*sizes: int, reverse: bool = False) -> Mesh:
    chosen = jax.devices()[: int(np.prod(sizes))]
    return Mesh(np.array(chosen[::-1] if reverse else chosen).reshape(sizes), AXES)


def over(sharding: Sharding, shape=(8, 4), dtype=np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def spread(*spec, sizes=(1, 2, 4), **kind) -> jax.ShapeDtypeStruct:
    return over(NamedSharding(mesh(*sizes, **kind), PartitionSpec(*spec)))


def norm(epsilon: float = 1e-5) -> layers.LayerNorm:
    return layers.LayerNorm(4, epsilon=epsilon, dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(0))


def other_function(x):
    return x


class Restyled(layers.LayerNorm):
    """A network of somebody's own, under any name."""


Restyled.__qualname__ = Restyled.__name__ = "LayerNorm"

ONE = jax.ShapeDtypeStruct((3,), np.float32)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (((ONE,),), ((jax.ShapeDtypeStruct((4,), np.float32),),)),
        (((ONE,),), ((jax.ShapeDtypeStruct((3,), jnp.bfloat16),),)),
        (((ONE,),), ((jax.ShapeDtypeStruct((3,), np.float32, weak_type=True),),)),
        (((ONE,),), (([ONE],),)),
        (((ONE, None),), ((None, ONE),)),
        (((ONE,),), ((over(SingleDeviceSharding(jax.devices()[1]), (3,)),),)),
        (((spread("context"),),), ((spread(None, "context"),),)),
        (((spread("context"),),), ((spread("pair"),),)),
        (((spread("context"),),), ((spread("context", sizes=(2, 1, 4)),),)),
        (((spread("context"),),), ((spread("context", reverse=True),),)),
        (((norm(1e-5),),), ((norm(1e-6),),)),
        (((ONE,), {"slab": 1}), ((ONE,), {"slab": 2})),
        (((ONE,), {"slab": 1}), ((ONE,), {"slab": True})),
        (((ONE,), {"attend": attention.xla}), ((ONE,), {"attend": attention.cudnn})),
        (
            ((ONE,), {"attend": partial(attention.xla, k=1)}),
            ((ONE,), {"attend": partial(attention.xla, k=2)}),
        ),
        (((ONE,), {"mesh": mesh(1, 2, 4)}), ((ONE,), {"mesh": mesh(1, 4, 2)})),
        (((ONE,), {"mesh": mesh(1, 2, 4)}), ((ONE,), {"mesh": mesh(1, 2, 4, reverse=True)})),
        (((ONE,), {}, {"option": "1"}), ((ONE,), {}, {"option": "2"})),
        (((ONE,), {}, {}, layers.silu), ((ONE,), {}, {}, layers.gelu)),
    ],
)
def test_whatever_decides_an_executable_changes_its_fingerprint(one: tuple, other: tuple) -> None:
    first, second = print_of(*one), print_of(*other)
    assert None not in (first, second)
    assert first != second
    assert first == print_of(*one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.ones(3, np.float32), ONE),
        (jnp.ones(3, np.float32), ONE),
        (
            jax.device_put(np.ones((8, 4), np.float32), spread("context").sharding),
            spread("context"),
        ),
        (spread("context"), spread(("context",), None)),
        (spread("context"), spread(("data", "context"))),  # an axis of one device
        (spread(sizes=(1, 1, 1)), spread("data", sizes=(1, 1, 1))),
        (spread(sizes=(1, 1, 1)), over(SingleDeviceSharding(jax.devices()[0]))),
    ],
)
def test_shapes_do_in_place_of_arrays_and_equal_places_in_other_words(one, other) -> None:
    assert print_of((one,)) == print_of((other,)) is not None


def test_values_of_arguments_are_not_looked_at() -> None:
    assert print_of((norm(), np.zeros(3))) == print_of((norm(), np.ones(3))) is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(fingerprint, "SOURCES", "others"),
        lambda patch: patch.setattr(fingerprint, "version", lambda package: "0.0"),
        lambda patch: patch.setattr(fingerprint, "_processor", lambda: "another"),
        lambda patch: patch.setattr(jax, "process_count", lambda: 2),
        lambda patch: patch.setattr(jax, "process_index", lambda: 1),
        lambda patch: patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"),
        lambda patch: patch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=1"),
    ],
)
def test_software_flags_and_the_machine_are_part_of_it(
    change, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = print_of((ONE,))
    change(monkeypatch)
    assert None is not print_of((ONE,)) != before


@pytest.mark.parametrize(
    ("setting", "value"), [("jax_default_matmul_precision", "bfloat16"), ("jax_enable_x64", True)]
)
def test_settings_of_jax_that_change_numbers_are_part_of_it(setting: str, value) -> None:
    before, fingerprint_before = jax.config.values[setting], print_of((ONE,))
    jax.config.update(setting, value)
    try:
        assert None is not print_of((ONE,)) != fingerprint_before
    finally:
        jax.config.update(setting, before)


def test_where_jax_keeps_its_own_cache_is_not_part_of_it(tmp_path: Path) -> None:
    before, fingerprint_before = jax.config.values["jax_compilation_cache_dir"], print_of((ONE,))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        assert print_of((ONE,)) == fingerprint_before
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    "given",
    [
        {"function": lambda x: x},
        {"function": other_function},  # of a module whose sources nobody hashes
        {"static": {"attend": lambda q, k, v: v}},
        {"static": {"attend": partial(lambda q, k, v: v, k=1)}},
        {"static": {"attend": partial(attention.xla, k=object())}},
        {"static": {"attend": norm().__call__}},  # bound to an object
        {"args": (Restyled(4, epsilon=1e-5, dtype=jnp.dtype(jnp.float32), rngs=nnx.Rngs(0)),)},
    ],
)
def test_what_another_process_could_not_name_has_no_fingerprint(given: dict) -> None:
    assert print_of(**given) is None


def test_several_processes_on_gpus_have_none_because_they_tune_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Mock(
        spec=jax.Device,
        platform="gpu",
        device_kind="NVIDIA H100 80GB HBM3",
        id=0,
        coords=None,
        process_index=0,
    )
    gpu.client.platform_version = "cuda 12090"
    monkeypatch.setattr(fingerprint, "devices", lambda args: [gpu])
    monkeypatch.setattr(jax, "devices", lambda platform: [gpu])
    assert print_of((ONE,)) is not None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert print_of((ONE,)) is None


@pytest.mark.parametrize(
    "value",
    [
        None,
        1.5,
        "xla",
        (1, "a"),
        {"b": 1, "a": 2},
        np.float32(1),
        jnp.dtype(jnp.bfloat16),
        lax.Precision.HIGHEST,
        PartitionSpec("data"),
    ],
)
def test_plain_values_have_words(value) -> None:
    assert describe(value) == describe(value)
    assert describe(value) != describe((value,))


def test_named_tuples_are_told_from_plain_ones() -> None:
    row = schedule.Tableau(*range(8))
    assert describe(row) != describe(tuple(row))


def test_two_partials_of_the_same_parts_are_described_alike() -> None:
    words = describe(partial(attention.xla, k=1))
    assert words == describe(partial(attention.xla, k=1))
    assert "xla" in words
    with pytest.raises(UnnamedError):
        describe(partial(attention.xla, k={1}))


def test_devices_are_in_the_order_of_the_mesh() -> None:
    turned = mesh(1, 2, 4, reverse=True)
    assert devices((ONE, over(NamedSharding(turned, PartitionSpec("context"))))) == list(
        turned.devices.flat
    )
    assert devices((ONE,)) == jax.devices()[:1]


def test_sources_are_hashed_by_path_and_content(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "models" / "b.py").write_text("y = 1\n")
    seen = {fingerprint._hash_sources(tmp_path)}
    (tmp_path / "models" / "b.py").write_text("y = 2\n")
    seen.add(fingerprint._hash_sources(tmp_path))
    (tmp_path / "models" / "b.py").rename(tmp_path / "b.py")
    seen.add(fingerprint._hash_sources(tmp_path))
    assert len(seen) == 3


SCRIPT = """
from functools import partial
import numpy as np
from cogi2v_jax import attention, phases
from cogi2v_jax.checkpoint import abstract
from cogi2v_jax.config import named
from cogi2v_jax.fingerprint import fingerprint
network = abstract(named("cogi2v-tiny"), "vae", np.dtype("float32"))
print(fingerprint(phases.decode_latents, (network, np.ones(3)), {"attend": partial(attention.xla, k=1), "slab": 1}, {}))
"""


def test_two_processes_find_the_same_fingerprint() -> None:
    def run(seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    first = run("1")
    assert len(first) == 64
    assert run("2") == first
