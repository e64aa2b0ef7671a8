"""Families of text-to-image pipelines: what their encoders tell the network of prompts, and their pictures of latents.

A further family is an entry of `FAMILIES`: the pipeline's class, and a function that maps the pipeline and prompts to
tensors under the names by which its network takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vardistill.denoisers.diffusers import found_variant, import_diffusers, read_index, unreadable
from vardistill.errors import UsageError

Encode = Callable[[Any, Sequence[str]], Mapping[str, Tensor]]
"""A pipeline and n prompts → tensors (n, ...) by the network's names."""

OPTIONAL = ("feature_extractor", "image_encoder", "safety_checker", "text_encoder_3", "tokenizer_3")
"""Components that a pipeline may be without: one that was saved so does not name them."""

BLOCK = 64
"""Prompts that are encoded, and pictures that are decoded, at once."""


def stable_diffusion(pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Token states of CLIP, (n, tokens, width): versions 1 and 2."""
    states, _ = pipeline.encode_prompt(list(prompts), pipeline.device, 1, False)
    return {"encoder_hidden_states": states}


def stable_diffusion_xl(pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Token states of two encoders, the pooled state of the second, and sizes: the picture's, none of it cropped."""
    states, _, pooled, _ = pipeline.encode_prompt(
        list(prompts), device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=states.dtype, device=states.device)
    return {"encoder_hidden_states": states, "text_embeds": pooled, "time_ids": ids.expand(len(prompts), -1)}


def stable_diffusion_3(pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Token states of three encoders beside each other, and the pooled states of CLIP's two."""
    text = list(prompts)
    states, _, pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


FAMILIES: dict[str, Encode] = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
}
"""By the class of the pipeline."""


def family_of(source: str) -> str:
    """The pipeline's class; raises UsageError for a folder or hub id that is none of `FAMILIES`."""
    name = read_index(source).get("_class_name")
    if name not in FAMILIES:
        raise UsageError(f"{source} is a {name}, but text to image takes one of {', '.join(FAMILIES)}")
    return str(name)


def load_pipeline(source: str, variant: str | None = None, **parts: Any) -> Any:
    """The whole pipeline, in single precision; no code of its folder is run.

    Args:
        source: its folder or hub id.
        variant: of its weights.
        parts: components by name, which are then not read.

    Raises:
        UsageError: where it cannot be read.
    """
    name, local = family_of(source), Path(source).is_dir()
    if local:
        part = "transformer" if (Path(source) / "transformer").is_dir() else "unet"
        variant = found_variant(source, part, variant)
    options = {"use_safetensors": True, "variant": variant, "local_files_only": local}
    index, kind = read_index(source), getattr(import_diffusers(), name)
    left_out = [part for part in OPTIONAL if part in signature(kind).parameters and not (index.get(part) or [None])[0]]
    try:
        with quiet():
            pipeline = kind.from_pretrained(source, **options, **dict.fromkeys(left_out), **parts)
    except Exception as error:  # files may be missing or damaged: each reader has its own errors
        raise unreadable(source, "a component", error) from error
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            nn.Module.float(part)  # diffusers' own warns
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of diffusers and transformers, on prompts that are cut for example: they are told once."""
    kinds = import_diffusers().utils.logging, import_module("transformers").utils.logging
    before = [kind.get_verbosity() for kind in kinds]
    try:
        for kind in kinds:
            kind.set_verbosity_error()
        yield
    finally:
        for kind, verbosity in zip(kinds, before, strict=True):
            kind.set_verbosity(verbosity)


@torch.no_grad()
def encoded(pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The conditions of the prompts, and in the last row of the empty one, (n + 1, ...) each on the CPU."""
    encode, texts = FAMILIES[type(pipeline).__name__], [*prompts, ""]
    with quiet():
        parts = [encode(pipeline, texts[start : start + BLOCK]) for start in range(0, len(texts), BLOCK)]
    return {name: torch.cat([part[name].cpu() for part in parts]).contiguous() for name in parts[0]}


def cut(pipeline: Any, prompts: Sequence[str]) -> list[str]:
    """The prompts that the first tokenizer cuts, for they are too long."""
    tokenizer = pipeline.tokenizer
    with quiet():
        lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=False).input_ids]
    return [text for text, length in zip(prompts, lengths, strict=True) if length > tokenizer.model_max_length]


@torch.no_grad()
def in_latents(vae: Any, pictures: Iterable[Tensor], rng: torch.Generator) -> Tensor:
    """Latents (n, C, h, w) as the network has them, on the CPU, of blocks of pictures in [−1, 1].

    x = (z − shift) · scaling of z ~ q(z | picture), with the two numbers of the autoencoder's configuration.

    Args:
        vae: an `AutoencoderKL`.
        pictures: (m, 3, H, W) each.
        rng: on the CPU; draws z.
    """
    (scaling, shift), like, found = numbers(vae), next(vae.parameters()), []
    for part in pictures:
        q = vae.encode(part.to(like)).latent_dist
        z = q.mean.cpu() + q.std.cpu() * torch.randn(q.mean.shape, generator=rng)
        found.append((z - shift) * scaling)
    return torch.cat(found)


def numbers(vae: Any) -> tuple[float, float]:
    """Scaling and shift."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures (n, 3, H, W), about in [−1, 1], of latents as the network has them, (n, C, h, w); differentiable."""
    scaling, shift = numbers(vae)
    pictures: Tensor = vae.decode(latents.to(next(vae.parameters())) / scaling + shift).sample
    return pictures


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Pictures (n, 3, H, W) in [−1, 1] of latents, on the CPU."""
    return torch.cat([decode(vae, x).clamp(-1, 1).cpu() for x in latents.split(BLOCK)]).float()
