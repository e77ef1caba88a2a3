"""Names in llama.cpp's GGUF files of a T5 encoder, and transformers' names for the same tensors."""

import re
from collections.abc import Iterable

from .rules import FileTensor

BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")
MODULES = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
WHOLE = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
}


def text_encoder(names: Iterable[str]) -> dict[str, FileTensor]:
    """The tensors in a file under transformers' names, without those of a T5's decoder. An unknown
    tensor keeps its name, so that the error for it shows that name."""
    kept = (name for name in names if not name.startswith("dec.") and name != "output.weight")
    return {_name(name): FileTensor(name) for name in kept}


def _name(name: str) -> str:
    block = BLOCK.fullmatch(name)
    if block and block[2] in MODULES:
        return f"encoder.block.{block[1]}.{MODULES[block[2]]}.weight"
    return WHOLE.get(name, name)
