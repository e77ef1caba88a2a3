"""Compiler options: those of a device kind, the user's over them, and what a compiler doesn't
take."""

import jax
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
    monkeypatch.setattr(module, "OPTIONS", {"TPU v9": {"xla_one": "1", "xla_two": "true"}})
    monkeypatch.setattr(module, "LOOP", {"TPU v9": {"xla_two": "false", "xla_four": "4"}})
    monkeypatch.delenv(VARIABLE, raising=False)


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
def test_the_user_s_options_lie_over_those_of_the_device(
    chosen, options, table, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chosen is not None:
        monkeypatch.setenv(VARIABLE, chosen)
    assert compiler_options("TPU v9") == options


def test_the_loop_has_options_of_its_own_and_the_user_s_lie_over_these_too(
    table, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiler_options("TPU v9", loop=True) == {
        "xla_one": "1",
        "xla_two": "false",
        "xla_four": "4",
    }
    monkeypatch.setenv(VARIABLE, "xla_two=maybe xla_four=")
    assert compiler_options("TPU v9", loop=True) == {"xla_one": "1", "xla_two": "maybe"}


def test_the_loop_s_options_reach_the_loop_s_compiler_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LOOP", {"cpu": {"xla_cpu_enable_fast_math": "false"}})
    seen, compile_ = [], jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered,
        "compile",
        lambda self, compiler_options=None: (
            seen.append(compiler_options) or compile_(self, compiler_options)
        ),
    )
    for loop in (False, True):
        Program(lambda x: x + 2, loop=loop).compile(jax.ShapeDtypeStruct((), float))
    assert seen == [None, {"xla_cpu_enable_fast_math": False}]
    assert STAGES[stages.denoise].program.loop
    assert not STAGES[stages.decode].program.loop


def test_an_unknown_device_has_the_user_s_options_alone(
    table, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiler_options("TPU v10") == {}
    monkeypatch.setenv(VARIABLE, "xla_one=5")
    assert compiler_options("TPU v10") == {"xla_one": "5"}


@pytest.mark.parametrize("chosen", ["xla_one", "xla_one=1 =2", "xla_one 1", "--xla_one=1"])
def test_what_is_no_option_is_refused_by_its_word(
    chosen: str, table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, chosen)
    with pytest.raises(
        ValueError, match=f"^{VARIABLE} must be name=value pairs with spaces between them: got '"
    ):
        compiler_options("TPU v9")


def test_the_report_says_what_is_handed_over_and_who_chose_it(
    table, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_options_reach_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, compile_ = [], jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered,
        "compile",
        lambda self, compiler_options=None: (
            seen.append(compiler_options) or compile_(self, compiler_options)
        ),
    )
    monkeypatch.setenv(
        VARIABLE,
        "xla_cpu_enable_fast_math=true xla_backend_optimization_level=1 xla_dump_hlo_as_text=False",
    )
    assert float(Program(lambda x: x + 1).compile(jax.ShapeDtypeStruct((), float))(1.0)) == 2
    assert seen == [
        {
            "xla_cpu_enable_fast_math": True,
            "xla_backend_optimization_level": "1",
            "xla_dump_hlo_as_text": False,
        }
    ]


@pytest.mark.parametrize("option", ["xla_no_such_option=1", "xla_cpu_enable_fast_math=perhaps"])
def test_an_option_of_the_user_s_that_the_compiler_does_not_take_is_one_error(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, option)
    with pytest.raises(
        ValueError, match=f"^{VARIABLE} must name options that this compiler knows: got {option}"
    ) as caught:
        compile_with(compiler_options("cpu"), lowered())
    assert len(str(caught.value).splitlines()) == 1


def test_an_option_of_ours_that_the_compiler_does_not_take_is_left_out_in_one_line(
    capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "OPTIONS", {"cpu": {"xla_cpu_enable_fast_math": "true", "xla_no_such_option": "1"}}
    )
    assert float(compile_with(compiler_options("cpu"), lowered())(1.0)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "compiling without an option that this compiler does not know: xla_no_such_option=1 "
    )


def test_other_failures_of_the_compiler_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self, compiler_options=None):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory with xla_one")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compile_with({"xla_one": "1"}, lowered())


@pytest.mark.parametrize("name", NAMES)
def test_a_tpu_s_compiler_takes_every_option_of_its_row(name: str, capsys) -> None:
    mesh = chip(name)
    (device,) = mesh.devices.flat
    assert compiler_options(device.device_kind).keys() >= {"xla_tpu_enable_async_all_to_all"}
    x = jax.ShapeDtypeStruct((256, 256), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    compile_with(compiler_options(device.device_kind, loop=True), jax.jit(lambda x: x @ x).lower(x))
    assert "compiler option" not in capsys.readouterr().err


def test_a_tpu_s_compiler_s_refusals_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jax.ShapeDtypeStruct(
        (256, 256), np.float32, sharding=NamedSharding(chip("v5e"), PartitionSpec())
    )
    for option in ("xla_tpu_no_such_option=1", "xla_tpu_scoped_vmem_limit_kib=much"):
        monkeypatch.setenv(VARIABLE, option)
        with pytest.raises(
            ValueError,
            match=f"^{VARIABLE} must name options that this compiler knows: got {option}",
        ):
            compile_with(
                compiler_options("TPU v5 lite", loop=True), jax.jit(lambda x: x @ x).lower(x)
            )
