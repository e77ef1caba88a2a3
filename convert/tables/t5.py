"""text_encoder/: T5EncoderModel."""

from cogi2v_jax.config import TextEncoderConfig

from .rules import Rule, Table, linear

# The input embedding is tied: files hold either name, or both.
TIED = {"encoder.embed_tokens.weight": "shared.weight"}


def table(config: TextEncoderConfig) -> Table:
    del config  # every T5 v1.1 has the same names
    block, attention = "encoder.block.{}.layer", "encoder.block.{}.layer.0.SelfAttention"
    mlp = f"{block}.1.DenseReluDense"
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Rule("shared.weight", "embedding"),
        Rule(bias, "position_bias"),
        Rule(f"{block}.0.layer_norm.weight", "blocks.attn_norm.scale"),
        *linear(f"{attention}.q", "blocks.attn.q", bias=False),
        *linear(f"{attention}.k", "blocks.attn.k", bias=False),
        *linear(f"{attention}.v", "blocks.attn.v", bias=False),
        *linear(f"{attention}.o", "blocks.attn.out", bias=False),
        Rule(f"{block}.1.layer_norm.weight", "blocks.mlp_norm.scale"),
        *linear(f"{mlp}.wi_0", "blocks.mlp.gate", bias=False),
        *linear(f"{mlp}.wi_1", "blocks.mlp.up", bias=False),
        *linear(f"{mlp}.wo", "blocks.mlp.down", bias=False),
        Rule("encoder.final_layer_norm.weight", "norm.scale"),
    )
