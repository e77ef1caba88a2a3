"""transformer/: CogVideoXTransformer3DModel."""

from cogi2v_jax.config import TransformerConfig

from .rules import Rule, Table, linear, norm

# Rotary channel pairs of a head: adjacent in torch, half a head apart here (see
# models.attention.rotate). n heads, k pairs, r the two channels of a pair.
ADJACENT = "(n k r)"
HALVES = "(n r k)"


def table(config: TransformerConfig) -> Table:
    t, p, q = config.patch
    patch = {"t": t, "p": p, "q": q}
    heads = {"n": config.num_attention_heads, "r": 2}

    def rotary(torch: str, flax: str) -> Table:
        return (
            Rule(f"{torch}.weight", f"{flax}.kernel", f"{ADJACENT} i -> i {HALVES}", heads),
            Rule(f"{torch}.bias", f"{flax}.bias", f"{ADJACENT} -> {HALVES}", heads),
        )

    def rotary_norm(torch: str, flax: str) -> Table:
        return (
            Rule(f"{torch}.weight", f"{flax}.scale", "(k r) -> (r k)", {"r": 2}),
            Rule(f"{torch}.bias", f"{flax}.bias", "(k r) -> (r k)", {"r": 2}),
        )

    if config.patch_size_t is None:  # 1.0 patches with a convolution, 1.5 with a linear layer
        axes, sizes, has_bias = "o c p q -> (p q c) o", {"p": p, "q": q}, config.patch_bias
    else:
        axes, sizes, has_bias = "o (c t p q) -> (t p q c) o", patch, True
    rules = [Rule("patch_embed.proj.weight", "video_in.kernel", axes, sizes)]
    if has_bias:
        rules.append(Rule("patch_embed.proj.bias", "video_in.bias"))
    if config.use_learned_positional_embeddings:
        rules.append(Rule("patch_embed.pos_embedding", "table", "1 s d -> s d"))
    if config.ofs_embed_dim:
        rules += linear("ofs_embedding.linear_1", "modulation.ofs.linear_1")
        rules += linear("ofs_embedding.linear_2", "modulation.ofs.linear_2")
    return (
        *rules,
        *linear("patch_embed.text_proj", "text_in"),
        *linear("time_embedding.linear_1", "modulation.time.linear_1"),
        *linear("time_embedding.linear_2", "modulation.time.linear_2"),
        *linear("transformer_blocks.{}.norm1.linear", "modulation.blocks.attn"),
        *norm("transformer_blocks.{}.norm1.norm", "blocks.attn_norm"),
        *rotary("transformer_blocks.{}.attn1.to_q", "blocks.attn.q"),
        *rotary("transformer_blocks.{}.attn1.to_k", "blocks.attn.k"),
        *linear("transformer_blocks.{}.attn1.to_v", "blocks.attn.v"),
        *rotary_norm("transformer_blocks.{}.attn1.norm_q", "blocks.attn.norm_q"),
        *rotary_norm("transformer_blocks.{}.attn1.norm_k", "blocks.attn.norm_k"),
        *linear("transformer_blocks.{}.attn1.to_out.0", "blocks.attn.out"),
        *linear("transformer_blocks.{}.norm2.linear", "modulation.blocks.mlp"),
        *norm("transformer_blocks.{}.norm2.norm", "blocks.mlp_norm"),
        *linear("transformer_blocks.{}.ff.net.0.proj", "blocks.mlp.up"),
        *linear("transformer_blocks.{}.ff.net.2", "blocks.mlp.down"),
        *norm("norm_final", "norm"),
        *linear("norm_out.linear", "modulation.out"),
        *norm("norm_out.norm", "out_norm"),
        Rule("proj_out.weight", "out.kernel", "(c t p q) i -> i (t p q c)", patch),
        Rule("proj_out.bias", "out.bias", "(c t p q) -> (t p q c)", patch),
    )
