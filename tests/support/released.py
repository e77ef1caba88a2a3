"""The configuration files of the released checkpoints."""

import json
from pathlib import Path
from typing import Any

import cogi2v_jax
from cogi2v_jax.config import PARTS
from cogi2v_jax.disk import read_json

TINY = Path(cogi2v_jax.__file__).parent / "assets" / "cogi2v-tiny"
TRANSFORMER = json.loads("""{
    "_class_name": "CogVideoXTransformer3DModel", "_diffusers_version": "0.31.0", "dropout": 0.0,
    "num_attention_heads": 48, "attention_head_dim": 64, "num_layers": 42, "in_channels": 32,
    "out_channels": 16, "patch_size": 2, "text_embed_dim": 4096, "time_embed_dim": 512,
    "max_text_seq_length": 226, "temporal_compression_ratio": 4,
    "spatial_interpolation_scale": 1.875, "temporal_interpolation_scale": 1.0,
    "use_rotary_positional_embeddings": true, "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu", "attention_bias": true, "flip_sin_to_cos": true,
    "freq_shift": 0, "norm_elementwise_affine": true, "norm_eps": 1e-05
}""")
FIRST = json.loads("""{
    "sample_height": 60, "sample_width": 90, "sample_frames": 49,
    "use_learned_positional_embeddings": true
}""")
SECOND = json.loads("""{
    "sample_height": 300, "sample_width": 300, "sample_frames": 81,
    "use_learned_positional_embeddings": false, "patch_size_t": 2, "ofs_embed_dim": 512,
    "patch_bias": false
}""")
VAE = json.loads("""{
    "_class_name": "AutoencoderKLCogVideoX", "act_fn": "silu", "force_upcast": true,
    "in_channels": 3, "out_channels": 3,
    "down_block_types": ["CogVideoXDownBlock3D", "CogVideoXDownBlock3D",
        "CogVideoXDownBlock3D", "CogVideoXDownBlock3D"],
    "up_block_types": ["CogVideoXUpBlock3D", "CogVideoXUpBlock3D",
        "CogVideoXUpBlock3D", "CogVideoXUpBlock3D"],
    "block_out_channels": [128, 256, 256, 512], "latent_channels": 16, "layers_per_block": 3,
    "norm_eps": 1e-06, "norm_num_groups": 32, "sample_height": 480, "sample_width": 720,
    "temporal_compression_ratio": 4, "scaling_factor": 0.7, "shift_factor": null,
    "latents_mean": null, "latents_std": null, "use_quant_conv": false,
    "use_post_quant_conv": false
}""")
TEXT_ENCODER = json.loads("""{
    "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "d_kv": 64,
    "d_ff": 10240, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_encoder_decoder": true,
    "use_cache": true, "layer_norm_epsilon": 1e-06, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32
}""")
SCHEDULER = json.loads("""{
    "_class_name": "CogVideoXDDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
    "timestep_spacing": "trailing", "rescale_betas_zero_snr": true, "snr_shift_scale": 1.0,
    "set_alpha_to_one": true, "trained_betas": null, "clip_sample": false,
    "clip_sample_range": 1.0, "sample_max_value": 1.0, "steps_offset": 0
}""")
SHARED = {"vae": VAE, "text_encoder": TEXT_ENCODER, "scheduler": SCHEDULER}
RELEASED = {
    "cogvideox-5b-i2v": {**SHARED, "transformer": {**TRANSFORMER, **FIRST}},
    "cogvideox1.5-5b-i2v": {
        **SHARED,
        "transformer": {**TRANSFORMER, **SECOND},
        "vae": {**VAE, "invert_scale_latents": True},
    },
    "cogi2v-tiny": {part: read_json(next((TINY / part).glob("*config.json"))) for part in PARTS},
}


def changed(name: str, part: str, **values: Any) -> dict[str, dict[str, Any]]:
    return {**RELEASED[name], part: {**RELEASED[name][part], **values}}
