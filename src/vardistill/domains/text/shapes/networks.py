"""The untrained components of a Stable Diffusion pipeline of shapes, all of them from configurations.

    picture (3, 32, 32) → autoencoder → latents (16, 8, 8) → U-Net with cross-attention ← CLIP's text model ← caption

The tokenizer's vocabulary is the formula's: each of its words is a token.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from vardistill.denoisers.diffusers import import_diffusers
from vardistill.domains.pictures.config import UNetConfig
from vardistill.domains.text.shapes.formula import SIDE, WORDS
from vardistill.networks import initial_weights

TOKENS = 16
"""Of a prompt: the longest caption has 13 words, and there are two marks."""

START, END = "<|startoftext|>", "<|endoftext|>"

LATENT_CHANNELS, HALVINGS = 16, 2
"""Of the autoencoder."""


def tokenizer() -> Any:
    """A `CLIPTokenizer` that has a token for every word of the captions, and one for each letter of other words."""
    merges = merges_of(WORDS)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = dict.fromkeys([*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in merges), START, END])
    with TemporaryDirectory() as folder:
        vocabulary, rules = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        rules.write_text("\n".join(lines), encoding="utf-8")
        kind = import_module("transformers").CLIPTokenizer
        return kind(str(vocabulary), str(rules), model_max_length=TOKENS)


def merges_of(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Rules of byte-pair encoding, first ones first, that make each word one token.

    A rule joins the first two pieces that are left of the first word with more than one; it comes after those that the
    words before it need, and so changes nothing of them.
    """
    merges: list[tuple[str, str]] = []
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    while left := next((parts for parts in pieces if len(parts) > 1), None):
        pair = left[0], left[1]
        merges.append(pair)
        pieces = [joined(parts, pair) for parts in pieces]
    return merges


def joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces of a word with every occurrence of the pair as one."""
    found: list[str] = []
    for part in parts:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return found


def text_encoder(words: Any, width: int, layers: int, seed: int) -> nn.Module:
    """A `CLIPTextModel` for a tokenizer's tokens."""
    transformers = import_module("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    with initial_weights(seed):
        network: nn.Module = transformers.CLIPTextModel(config)
    return network


def autoencoder(seed: int) -> Any:
    """An `AutoencoderKL` of three resolutions."""
    channels = (8, 16, 32)
    assert len(channels) == HALVINGS + 1
    with initial_weights(seed):
        return import_diffusers().AutoencoderKL(
            block_out_channels=channels, layers_per_block=1, norm_num_groups=4, latent_channels=LATENT_CHANNELS,
            sample_size=SIDE, mid_block_add_attention=False, down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
        )  # fmt: skip


def unet(config: UNetConfig, text_width: int, seed: int) -> nn.Module:
    """A `UNet2DConditionModel` of the latents.

    Attention to pictures and captions at every resolution, and a pooled caption beside the time.
    """
    levels = len(config.channels)
    with initial_weights(seed):
        network: nn.Module = import_diffusers().UNet2DConditionModel(
            sample_size=SIDE >> HALVINGS, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
            layers_per_block=config.blocks, block_out_channels=config.channels, norm_num_groups=8,
            attention_head_dim=8, cross_attention_dim=text_width, down_block_types=("CrossAttnDownBlock2D",) * levels,
            up_block_types=("CrossAttnUpBlock2D",) * levels, addition_embed_type="text",
            addition_embed_type_num_heads=4,
        )  # fmt: skip
    return network


def scheduler() -> Any:
    """Stable Diffusion's noise, for a network that predicts v."""
    return import_diffusers().DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
