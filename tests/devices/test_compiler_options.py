"""Compiler options: those of a device kind, those of the user, and what a compiler refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from topologies import NAMES, chip

from cogi2v_jax.devices import compiler_options as module
from cogi2v_jax.devices.compiler_options import VARIABLE, compile_with, compiler_options, report
from cogi2v_jax.devices.compiling import Program
from cogi2v_jax.sampling import stages
from cogi2v_jax.sampling.programs import STAGES


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of a device that does not exist, and none of the user's."""
    monkeypatch.setattr(module, "OPTIONS", {"TPU v9": {"xla_one": "1", "xla_two": "true"}})
    monkeypatch.setattr(module, "LOOP", {"TPU v9": {"xla_two": "false", "xla_four": "4"}})
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def compiled_with(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options of every program that is compiled, in order."""
    seen, compile_ = [], jax.stages.Lowered.compile

    def compile_and_keep(self: jax.stages.Lowered, compiler_options: Any = None) -> Any:
        seen.append(compiler_options)
        return compile_(self, compiler_options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_and_keep)
    return seen


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("chosen", "options"),
    [
        (None, {"xla_one": "1", "xla_two": "true"}),
        ("", {"xla_one": "1", "xla_two": "true"}),
        ("xla_one=5", {"xla_one": "5", "xla_two": "true"}),
        ("  xla_three=a=b   xla_two= ", {"xla_one": "1", "xla_three": "a=b"}),
        ("xla_absent=", {"xla_one": "1", "xla_two": "true"}),
    ],
)
def test_the_user_s_options_override_those_of_the_device(
    chosen: str | None, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if chosen is not None:
        monkeypatch.setenv(VARIABLE, chosen)
    assert compiler_options("TPU v9") == options


@pytest.mark.usefixtures("table")
def test_the_loop_has_further_options_and_the_user_s_override_these_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"xla_one": "1", "xla_two": "false", "xla_four": "4"}
    assert compiler_options("TPU v9", loop=True) == options
    monkeypatch.setenv(VARIABLE, "xla_two=maybe xla_four=")
    assert compiler_options("TPU v9", loop=True) == {"xla_one": "1", "xla_two": "maybe"}


def test_the_loop_alone_is_compiled_with_the_loop_s_options(
    compiled_with: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOP", {"cpu": {"xla_cpu_enable_fast_math": "false"}})
    for loop in (False, True):
        Program(lambda x: x + 2, loop=loop).compile(jax.ShapeDtypeStruct((), jnp.float32))
    assert compiled_with == [None, {"xla_cpu_enable_fast_math": False}]
    assert STAGES[stages.denoise].program.loop
    assert not STAGES[stages.decode].program.loop


@pytest.mark.usefixtures("table")
def test_an_unknown_device_has_the_user_s_options_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_options("TPU v10") == {}
    monkeypatch.setenv(VARIABLE, "xla_one=5")
    assert compiler_options("TPU v10") == {"xla_one": "5"}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("chosen", ["xla_one", "xla_one=1 =2", "xla_one 1", "--xla_one=1"])
def test_anything_but_name_value_pairs_is_refused(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, chosen)
    line = f"^{VARIABLE} must be name=value pairs with spaces between them: got '"
    with pytest.raises(ValueError, match=line):
        compiler_options("TPU v9")


@pytest.mark.usefixtures("table")
def test_the_report_has_every_option_and_who_chose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report("TPU v9") == [
        "compiler options for TPU v9:",
        "  xla_one=1",
        "  xla_two=false (denoising loop)",
        "  xla_four=4 (denoising loop)",
    ]
    assert report("TPU v10") == ["compiler options for TPU v10:", "  none"]
    monkeypatch.setenv(VARIABLE, "xla_two= xla_three=3")
    assert report("TPU v9") == [
        "compiler options for TPU v9:",
        "  xla_one=1",
        "  xla_four=4 (denoising loop)",
        f"  xla_three=3 ({VARIABLE})",
        f"  xla_two removed ({VARIABLE})",
    ]


def lowered(shift: float = 1.0) -> jax.stages.Lowered:
    return jax.jit(lambda x: x + shift).lower(1.0)


def test_options_reach_the_compiler(
    compiled_with: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = "xla_cpu_enable_fast_math=true xla_backend_optimization_level=1"
    monkeypatch.setenv(VARIABLE, f"{chosen} xla_dump_hlo_as_text=False")
    assert float(Program(lambda x: x + 1).compile(jax.ShapeDtypeStruct((), jnp.float32))(1.0)) == 2
    typed = {"xla_cpu_enable_fast_math": True, "xla_backend_optimization_level": "1"}
    assert compiled_with == [typed | {"xla_dump_hlo_as_text": False}]


LEFT_OUT = "compiling without an option that this compiler does not know:"
REFUSED = f"^{VARIABLE} must name options that this compiler knows: got"


@pytest.mark.parametrize("option", ["xla_no_such_option=1", "xla_cpu_enable_fast_math=perhaps"])
def test_an_option_of_the_user_s_that_the_compiler_refuses_is_an_error_of_one_line(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, option)
    with pytest.raises(ValueError, match=f"{REFUSED} {option}") as caught:
        compile_with(compiler_options("cpu"), lowered())
    assert len(str(caught.value).splitlines()) == 1


def test_an_option_of_ours_that_the_compiler_refuses_is_left_out_and_reported_in_one_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"xla_cpu_enable_fast_math": "true", "xla_no_such_option": "1"}
    monkeypatch.setattr(module, "OPTIONS", {"cpu": ours})
    assert float(compile_with(compiler_options("cpu"), lowered())(1.0)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{LEFT_OUT} xla_no_such_option=1 ")


def test_other_failures_of_the_compiler_are_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: jax.stages.Lowered, compiler_options: Any = None) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory with xla_one")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compile_with({"xla_one": "1"}, lowered())


@pytest.mark.parametrize("name", NAMES)
def test_a_tpu_s_compiler_accepts_every_option_of_its_row(
    name: str, capsys: pytest.CaptureFixture
) -> None:
    mesh = chip(name)
    (device,) = mesh.devices.flat
    assert compiler_options(device.device_kind).keys() >= {"xla_tpu_enable_async_all_to_all"}
    x = jax.ShapeDtypeStruct((256, 256), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    compile_with(compiler_options(device.device_kind, loop=True), jax.jit(lambda x: x @ x).lower(x))
    assert LEFT_OUT not in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["xla_tpu_no_such_option=1", "xla_tpu_scoped_vmem_limit_kib=much"]
)
def test_what_a_tpu_s_compiler_refuses_is_an_error(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharding = NamedSharding(chip("v5e"), PartitionSpec())
    x = jax.ShapeDtypeStruct((256, 256), np.float32, sharding=sharding)
    monkeypatch.setenv(VARIABLE, option)
    with pytest.raises(ValueError, match=f"{REFUSED} {option}"):
        compile_with(compiler_options("TPU v5 lite", loop=True), jax.jit(lambda x: x @ x).lower(x))
