"""The networks of Stable Diffusion 1.5, XL and 3.5 at their size, without weights."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

OPTIONS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    "sdxl": {
        "sample_size": 128, "cross_attention_dim": 2048, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20], "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
    },
    "sd35": {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64,
        "num_attention_heads": 24, "caption_projection_dim": 1536, "joint_attention_dim": 4096, "out_channels": 16,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
}  # fmt: skip


def network(name: str) -> Any:
    """On the meta device, in bfloat16."""
    kind = diffusers.SD3Transformer2DModel if name == "sd35" else diffusers.UNet2DConditionModel
    with torch.device("meta"):
        return torch.nn.Module.to(kind(**OPTIONS[name]), torch.bfloat16)
