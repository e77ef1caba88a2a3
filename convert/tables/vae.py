"""vae/: AutoencoderKLCogVideoX."""

from collections.abc import Callable
from itertools import pairwise

from cogi2v_jax.config import VAEConfig

from .rules import Rule, Table, norm


def table(config: VAEConfig) -> Table:
    widths, layers = config.block_out_channels, config.layers_per_block
    rules = [
        *causal("encoder.conv_in", "encoder.conv_in"),
        *resnets("encoder.mid_block", "encoder.middle", [False] * 2, norm),
        *norm("encoder.norm_out", "encoder.norm_out"),
        *causal("encoder.conv_out", "encoder.conv_out"),
        *causal("decoder.conv_in", "decoder.conv_in"),
        *resnets("decoder.mid_block", "decoder.middle", [False] * 2, spatial_norm),
        *spatial_norm("decoder.norm_out", "decoder.norm_out"),
        *causal("decoder.conv_out", "decoder.conv_out"),
    ]
    for side, scale, of_side, count, kind in (
        ("encoder", "down", widths, layers, norm),
        ("decoder", "up", widths[::-1], layers + 1, spatial_norm),
    ):
        for level, (inputs, outputs) in enumerate(pairwise((of_side[0], *of_side))):
            torch, flax = f"{side}.{scale}_blocks.{level}", f"{side}.stages.{level}"
            rules += resnets(torch, flax, [inputs != outputs] + [False] * (count - 1), kind)
            if level < len(widths) - 1:
                rules += conv(f"{torch}.{scale}samplers.0.conv", f"{flax}.resample.conv")
    return tuple(rules)


def resnets(
    torch: str, flax: str, shortcuts: list[bool], norm: Callable[[str, str], Table]
) -> Table:
    """Resnets with this kind of norm; `shortcuts` says which of them change the width."""
    rules: list[Rule] = []
    for index, shortcut in enumerate(shortcuts):
        theirs, ours = f"{torch}.resnets.{index}", f"{flax}.resnets.{index}"
        for which in (1, 2):
            rules += norm(f"{theirs}.norm{which}", f"{ours}.norm_{which}")
            rules += causal(f"{theirs}.conv{which}", f"{ours}.conv_{which}")
        if shortcut:
            rules += pointwise(f"{theirs}.conv_shortcut", f"{ours}.shortcut")
    return tuple(rules)


def spatial_norm(torch: str, flax: str) -> Table:
    return (
        *norm(f"{torch}.norm_layer", f"{flax}.norm"),
        *pointwise(f"{torch}.conv_y.conv", f"{flax}.scale"),
        *pointwise(f"{torch}.conv_b.conv", f"{flax}.shift"),
    )


def causal(torch: str, flax: str) -> Table:
    return conv(f"{torch}.conv", flax, "o i t h w -> t h w i o")


def pointwise(torch: str, flax: str) -> Table:
    return conv(torch, flax, "o i 1 1 1 -> i o")


def conv(torch: str, flax: str, axes: str = "o i h w -> h w i o") -> Table:
    return Rule(f"{torch}.weight", f"{flax}.kernel", axes), Rule(f"{torch}.bias", f"{flax}.bias")
