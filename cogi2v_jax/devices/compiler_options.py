"""Compiler options by device kind, handed to XLA with every program rather than through the
environment, which other programs share."""

import os
import re
import sys
from collections.abc import Mapping

import jax

VARIABLE = "COGI2V_COMPILER_OPTIONS"

# VMEM that one fusion may take for its tiles. The default leaves the products of the transformer's
# mlp short of it: figures are scheduled cycles of libtpu 0.0.52 for both of them on [2 17776 3072]
# bfloat16, against the floor of a full matrix unit. More than this gains 4 % at most, or loses as
# much on eight chips, and takes two to four times as long to compile. The VAE gains nothing, at
# five times the time.
_VMEM = "xla_tpu_scoped_vmem_limit_kib"
# Lets the exchange of one of q, k, v around attention run beside the product that makes the next:
# of the four all-to-alls of a layer, two or three become a start and a done, at 0 to 9 % fewer
# cycles elsewhere (v5e alone: 1 % more). Off by default in libtpu.
_EXCHANGE = {"xla_tpu_enable_async_all_to_all": "true"}

# Leaves products to cuBLASLt, which adds the bias before it rounds, once. Triton's own, of those
# that XLA tunes for, writes float32 sums or rounds them before the bias. With it and `layers.py`, a
# layer of 17,776 tokens moves 4.9 GB beside attention's own instead of 8.7.
_CUBLAS = {"xla_gpu_enable_triton_gemm": "false"}

# Kinds are as jax reports them, or their first word, for all that have no row of their own. A row
# holds what the compiler's own figures say helps, and nothing that was only read about.
OPTIONS: dict[str, dict[str, str]] = {
    "TPU v4": _EXCHANGE,
    "TPU v5 lite": _EXCHANGE,
    "TPU v5": _EXCHANGE,
    "TPU v6 lite": _EXCHANGE,
    "NVIDIA": _CUBLAS,
    "cpu": {},
}
# What the denoising loop is compiled with besides. A v4 has no more VMEM than the default limit.
LOOP: dict[str, dict[str, str]] = {
    # 45.0 -> 41.6 million cycles of at least 41.0; the whole transformer but attention -20 %.
    "TPU v5 lite": {_VMEM: "49152"},
    "TPU v5": {_VMEM: "32768"},  # 23.5 -> 20.9 of at least 20.5
    "TPU v6 lite": {_VMEM: "65536"},  # 20.8 -> 12.1 of at least 10.2
}


def compiler_options(kind: str, loop: bool = False) -> dict[str, str]:
    """The options for a device kind, as jax reports it, and for the denoising loop there, with
    those of COGI2V_COMPILER_OPTIONS="name=value name=value" laid over them; an empty value there
    removes an option. Raises ValueError for anything else in it."""
    ours = OPTIONS.get(kind, OPTIONS.get(kind.partition(" ")[0], {})) | (
        LOOP.get(kind, {}) if loop else {}
    )
    return {name: value for name, value in {**ours, **_users()}.items() if value}


def _users() -> dict[str, str]:
    words = os.environ.get(VARIABLE, "").split()
    wrong = [word for word in words if not re.fullmatch(r"\w+=.*", word)]
    if wrong:
        raise ValueError(
            f"{VARIABLE} must be name=value pairs with spaces between them: got {wrong[0]!r}"
        )
    return dict(word.split("=", 1) for word in words)


def report(kind: str) -> list[str]:
    """The options for a device kind as lines to print, those marked that the user chose and those
    that only the loop gets."""
    users, everywhere = _users(), compiler_options(kind)
    lines = []
    for name, value in compiler_options(kind, loop=True).items():
        mark = (
            f" ({VARIABLE})"
            if name in users
            else ""
            if everywhere.get(name) == value
            else " (denoising loop)"
        )
        lines.append(f"  {name}={value}{mark}")
    lines += [f"  {name} removed ({VARIABLE})" for name, value in users.items() if not value]
    return [f"compiler options for {kind}:", *(lines or ["  none"])]


def compile_with(options: Mapping[str, str], lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles with these options. One of ours that this version of the compiler doesn't take is
    left out, in one line. Raises ValueError for one of the user's."""
    typed = {
        name: {"true": True, "false": False}.get(value.lower(), value)
        for name, value in options.items()
    }
    try:
        return lowered.compile(compiler_options=typed or None)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        refused = next(
            (name for name in options if re.search(rf"^INVALID_ARGUMENT: .*\b{name}\b", message)),
            None,
        )
        if refused is None:
            raise
        got = f"{refused}={options[refused]} ({message.splitlines()[0]})"
        if refused in _users():
            raise ValueError(
                f"{VARIABLE} must name options that this compiler takes: got {got}"
            ) from None
    print(
        f"compiler option must be one that this compiler takes: got {got}; going on without it",
        file=sys.stderr,
    )
    return compile_with(
        {name: value for name, value in options.items() if name != refused}, lowered
    )
