"""text_encoder/: T5EncoderModel."""

from cogi2v_jax.config import TextEncoderConfig

from .rules import Rule, Table, linear

# The input embedding is tied, and files hold either name or both.
SAME = {"encoder.embed_tokens.weight": "shared.weight"}


def table(config: TextEncoderConfig) -> Table:
    del config  # every T5 v1.1 has the same names
    block = "encoder.block.{}.layer"
    return (
        Rule("shared.weight", "embedding"),
        Rule(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "position_bias"
        ),
        Rule(f"{block}.0.layer_norm.weight", "blocks.attn_norm.scale"),
        *linear(f"{block}.0.SelfAttention.q", "blocks.attn.q", bias=False),
        *linear(f"{block}.0.SelfAttention.k", "blocks.attn.k", bias=False),
        *linear(f"{block}.0.SelfAttention.v", "blocks.attn.v", bias=False),
        *linear(f"{block}.0.SelfAttention.o", "blocks.attn.out", bias=False),
        Rule(f"{block}.1.layer_norm.weight", "blocks.mlp_norm.scale"),
        *linear(f"{block}.1.DenseReluDense.wi_0", "blocks.mlp.gate", bias=False),
        *linear(f"{block}.1.DenseReluDense.wi_1", "blocks.mlp.up", bias=False),
        *linear(f"{block}.1.DenseReluDense.wo", "blocks.mlp.down", bias=False),
        Rule("encoder.final_layer_norm.weight", "norm.scale"),
    )
