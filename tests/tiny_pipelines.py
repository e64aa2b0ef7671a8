"""Text-to-image pipelines of a few thousand weights, in plain diffusers and transformers."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH, TOKENS = 16, 12


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Of single letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*string.ascii_lowercase, *string.digits]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def encoder(projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=74, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, projection_dim=WIDTH, bos_token_id=72, eos_token_id=73, pad_token_id=73,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(channels: int = 4) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def unet(**options: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **options,
    ).eval()  # fmt: skip


def stable_diffusion(folder: Path, prediction: str = "epsilon") -> Path:
    torch.manual_seed(0)
    options: Any = {"beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False}
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=encoder(), tokenizer=tokenizer(folder / "words"), unet=unet(cross_attention_dim=WIDTH),
        scheduler=diffusers.DDIMScheduler(prediction_type=prediction, **options),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def stable_diffusion_xl(folder: Path) -> Path:
    torch.manual_seed(0)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    words = tokenizer(folder / "words")
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=encoder(), text_encoder_2=encoder(True), tokenizer=words, tokenizer_2=words,
        unet=unet(cross_attention_dim=2 * WIDTH, projection_class_embeddings_input_dim=WIDTH + 6 * 4, **added),
        scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def stable_diffusion_3(folder: Path) -> Path:
    torch.manual_seed(0)
    words = tokenizer(folder / "words")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(),
        text_encoder=encoder(True), tokenizer=words, text_encoder_2=encoder(True), tokenizer_2=words,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


MAKERS = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3}
