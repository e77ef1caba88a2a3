"""Compiler options by device kind, handed to XLA with each program: environment variables would
reach the programs of others too."""

import os
import re
import sys
from collections.abc import Mapping

import jax

VARIABLE = "COGI2V_COMPILER_OPTIONS"

# VMEM that one fusion may take for its tiles. With the default the products of the transformer's
# mlp wait for memory. Figures are the scheduled cycles of both on [2 17776 3072] bfloat16 with
# libtpu 0.0.52, before, after, and with a matrix unit that is always busy. More than this gains at
# most 4 %, or loses as much on eight chips, and takes two to four times as long to compile. The VAE
# gains nothing, at five times the compile time.
_VMEM = "xla_tpu_scoped_vmem_limit_kib"
# Lets the exchange of one of q, k, v around attention run beside the product that computes the
# next: two or three of the four all-to-alls of a layer become asynchronous, at 0 to 9 % fewer
# cycles elsewhere (on one v5e: 1 % more). Off by default in libtpu.
_EXCHANGE = {"xla_tpu_enable_async_all_to_all": "true"}
# Leaves products to cuBLASLt, which adds the bias before it rounds. The Triton kernels among which
# XLA chooses write float32 sums, or round before the bias. With this option and `layers.py` a layer
# of 17,776 tokens moves 4.9 GB beside attention, instead of 8.7.
_CUBLAS = {"xla_gpu_enable_triton_gemm": "false"}

# Keys are device kinds as jax reports them, or the first word of kinds without a row of their own.
# An option is listed only where figures of the compiler itself show that it helps.
OPTIONS: dict[str, dict[str, str]] = {
    "TPU v4": _EXCHANGE,
    "TPU v5 lite": _EXCHANGE,
    "TPU v5": _EXCHANGE,
    "TPU v6 lite": _EXCHANGE,
    "TPU7x": _EXCHANGE,
    "NVIDIA": _CUBLAS,
    "cpu": {},
}
# Further options of the denoising loop. The VMEM of a v4 is no larger than the default limit.
LOOP: dict[str, dict[str, str]] = {
    # 45.0 -> 41.6 of at least 41.0 million cycles with 49152. libtpu 0.0.42 needs 49.0 MiB for the
    # attention of 1.5 on one chip.
    "TPU v5 lite": {_VMEM: "51200"},
    "TPU v5": {_VMEM: "32768"},  # 23.5 -> 20.9 of at least 20.5
    "TPU v6 lite": {_VMEM: "65536"},  # 20.8 -> 12.1 of at least 10.2
    # With both options 15.6 -> 14.9 static seconds for the 5B loop on eight devices, libtpu 0.0.50.
    "TPU7x": {_VMEM: "49152"},
}


def compiler_options(kind: str, loop: bool = False) -> dict[str, str]:
    """The options for a device kind, as jax reports it, and for the denoising loop. Those of
    COGI2V_COMPILER_OPTIONS="name=value name=value" override them; an empty value there removes an
    option. Raises ValueError for anything else in the variable."""
    ours = OPTIONS.get(kind, OPTIONS.get(kind.partition(" ")[0], {}))
    ours = {**ours, **(LOOP.get(kind, {}) if loop else {}), **_from_environment()}
    return {name: value for name, value in ours.items() if value}


def _from_environment() -> dict[str, str]:
    pairs = os.environ.get(VARIABLE, "").split()
    wrong = [pair for pair in pairs if not re.fullmatch(r"\w+=.*", pair)]
    if wrong:
        rule = "name=value pairs with spaces between them"
        raise ValueError(f"{VARIABLE} must be {rule}: got {wrong[0]!r}")
    return dict(pair.split("=", 1) for pair in pairs)


def report(kind: str) -> list[str]:
    """The options for a device kind as lines to print, marked where the user chose them or only the
    loop gets them."""
    chosen, everywhere = _from_environment(), compiler_options(kind)

    def mark(name: str, value: str) -> str:
        if name in chosen:
            return f" ({VARIABLE})"
        return "" if everywhere.get(name) == value else " (denoising loop)"

    options = compiler_options(kind, loop=True).items()
    lines = [f"  {name}={value}{mark(name, value)}" for name, value in options]
    lines += [f"  {name} removed ({VARIABLE})" for name, value in chosen.items() if not value]
    return [f"compiler options for {kind}:", *(lines or ["  none"])]


def compile_with(options: Mapping[str, str], lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles with these options. An option of ours that this compiler does not know is left out,
    with a line on stderr. Raises ValueError for such an option of the user's."""
    booleans = {"true": True, "false": False}
    typed = {name: booleans.get(value.lower(), value) for name, value in options.items()}
    try:
        return lowered.compile(compiler_options=typed or None)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        pattern = r"^INVALID_ARGUMENT: .*\b{}\b"
        refused = next((name for name in options if re.search(pattern.format(name), message)), None)
        if refused is None:
            raise
        got = f"{refused}={options[refused]} ({message.splitlines()[0]})"
        if refused in _from_environment():
            rule = "name options that this compiler knows"
            raise ValueError(f"{VARIABLE} must {rule}: got {got}") from None
    print(f"compiling without an option that this compiler does not know: {got}", file=sys.stderr)
    return compile_with(
        {name: value for name, value in options.items() if name != refused}, lowered
    )
