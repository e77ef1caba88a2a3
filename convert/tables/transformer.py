"""transformer/: CogVideoXTransformer3DModel."""

from cogi2v_jax.config import TransformerConfig

from .rules import Rule, Table, linear, norm

# A head's rotary channel pairs are interleaved there and half a head apart here (see
# models.transformer.rotate).
TURNED = "(n k r)"
HALVES = "(n r k)"


def table(config: TransformerConfig) -> Table:
    t, p, q = config.patch
    patch = {"t": t, "p": p, "q": q}
    heads = {"n": config.num_attention_heads, "r": 2}

    def turned(torch: str, flax: str) -> Table:
        return (
            Rule(f"{torch}.weight", f"{flax}.kernel", f"{TURNED} i -> i {HALVES}", heads),
            Rule(f"{torch}.bias", f"{flax}.bias", f"{TURNED} -> {HALVES}", heads),
        )

    def turned_norm(torch: str, flax: str) -> Table:
        return tuple(
            Rule(f"{torch}.{there}", f"{flax}.{here}", "(k r) -> (r k)", {"r": 2})
            for there, here in (("weight", "scale"), ("bias", "bias"))
        )

    flat = config.patch_size_t is None  # 1.0 patches with a convolution, 1.5 with a linear layer
    has_bias = config.patch_bias or not flat
    return (
        Rule("patch_embed.proj.weight", "video_in.kernel", "o c p q -> (p q c) o", {"p": p, "q": q})
        if flat
        else Rule(
            "patch_embed.proj.weight", "video_in.kernel", "o (c t p q) -> (t p q c) o", patch
        ),
        *([Rule("patch_embed.proj.bias", "video_in.bias")] if has_bias else []),
        *linear("patch_embed.text_proj", "text_in"),
        *(
            [Rule("patch_embed.pos_embedding", "table", "1 s d -> s d")]
            if config.use_learned_positional_embeddings
            else []
        ),
        *linear("time_embedding.linear_1", "modulation.time.linear_1"),
        *linear("time_embedding.linear_2", "modulation.time.linear_2"),
        *(
            linear("ofs_embedding.linear_1", "modulation.ofs.linear_1")
            if config.ofs_embed_dim
            else ()
        ),
        *(
            linear("ofs_embedding.linear_2", "modulation.ofs.linear_2")
            if config.ofs_embed_dim
            else ()
        ),
        *linear("transformer_blocks.{}.norm1.linear", "modulation.blocks.attn"),
        *norm("transformer_blocks.{}.norm1.norm", "blocks.attn_norm"),
        *turned("transformer_blocks.{}.attn1.to_q", "blocks.attn.q"),
        *turned("transformer_blocks.{}.attn1.to_k", "blocks.attn.k"),
        *linear("transformer_blocks.{}.attn1.to_v", "blocks.attn.v"),
        *turned_norm("transformer_blocks.{}.attn1.norm_q", "blocks.attn.norm_q"),
        *turned_norm("transformer_blocks.{}.attn1.norm_k", "blocks.attn.norm_k"),
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
