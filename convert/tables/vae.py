"""vae/: AutoencoderKLCogVideoX."""

from collections.abc import Callable

from cogi2v_jax.config import VAEConfig

from .rules import Rule, Table, norm


def table(config: VAEConfig) -> Table:
    widths = config.block_out_channels
    encoder = [((widths[0], *widths)[level], width) for level, width in enumerate(widths)]
    decoder = [
        ((widths[-1], *widths[::-1])[level], width) for level, width in enumerate(widths[::-1])
    ]
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
    for level, (inputs, outputs) in enumerate(encoder):
        there, here = f"encoder.down_blocks.{level}", f"encoder.stages.{level}"
        rules += resnets(
            there, here, [inputs != outputs] + [False] * (config.layers_per_block - 1), norm
        )
        rules += (
            conv(f"{there}.downsamplers.0.conv", f"{here}.resample.conv")
            if level < len(widths) - 1
            else ()
        )
    for level, (inputs, outputs) in enumerate(decoder):
        there, here = f"decoder.up_blocks.{level}", f"decoder.stages.{level}"
        rules += resnets(
            there, here, [inputs != outputs] + [False] * config.layers_per_block, spatial_norm
        )
        rules += (
            conv(f"{there}.upsamplers.0.conv", f"{here}.resample.conv")
            if level < len(widths) - 1
            else ()
        )
    return tuple(rules)


def resnets(
    torch: str, flax: str, shortcuts: list[bool], norm: Callable[[str, str], Table]
) -> Table:
    """Resnets with their kind of norm; `shortcuts` says which of them change their width."""
    rules: list[Rule] = []
    for index, shortcut in enumerate(shortcuts):
        there, here = f"{torch}.resnets.{index}", f"{flax}.resnets.{index}"
        for which in (1, 2):
            rules += norm(f"{there}.norm{which}", f"{here}.norm_{which}")
            rules += causal(f"{there}.conv{which}", f"{here}.conv_{which}")
        rules += pointwise(f"{there}.conv_shortcut", f"{here}.shortcut") if shortcut else ()
    return tuple(rules)


def spatial_norm(torch: str, flax: str) -> Table:
    return (
        *norm(f"{torch}.norm_layer", f"{flax}.norm"),
        *pointwise(f"{torch}.conv_y.conv", f"{flax}.scale"),
        *pointwise(f"{torch}.conv_b.conv", f"{flax}.shift"),
    )


def causal(torch: str, flax: str) -> Table:
    return Rule(f"{torch}.conv.weight", f"{flax}.kernel", "o i t h w -> t h w i o"), Rule(
        f"{torch}.conv.bias", f"{flax}.bias"
    )


def pointwise(torch: str, flax: str) -> Table:
    return Rule(f"{torch}.weight", f"{flax}.kernel", "o i 1 1 1 -> i o"), Rule(
        f"{torch}.bias", f"{flax}.bias"
    )


def conv(torch: str, flax: str) -> Table:
    return Rule(f"{torch}.weight", f"{flax}.kernel", "o i h w -> h w i o"), Rule(
        f"{torch}.bias", f"{flax}.bias"
    )
