"""The text encoder of shapes, fitted to know what captions say: its last state tells the judge's readings.

As in the large models, it is taught before the network that it conditions, and frozen then; from scratch, by the
network's loss alone, it learns far slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vardistill.domains.text.shapes.formula import captions_of, draw_labels
from vardistill.domains.text.shapes.judge import READINGS, reading_loss
from vardistill.domains.text.shapes.networks import text_encoder
from vardistill.files import whole
from vardistill.networks import initial_weights
from vardistill.progress import bar
from vardistill.training.optimisers import cosine

BATCH, LR = 128, 2e-3

BLOCK = 1000
"""Texts that are encoded at once."""


def fit_text_encoder(words: Any, width: int, layers: int, seed: int, steps: int) -> Any:
    """Fit a `CLIPTextModel` to captions and, as what says that there is nothing, the empty text.

    Args:
        words: the tokenizer.
        width: of its states.
        layers: of it.
        seed: of its weights and the captions.
        steps: of training.

    Returns:
        The encoder in evaluation mode, frozen.
    """
    encoder, rng = text_encoder(words, width, layers, seed), torch.Generator().manual_seed(seed)
    with initial_weights(seed):
        head = nn.Linear(width, len(READINGS))
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], fused=True)
    for step in bar(range(steps), name="text encoder", unit="steps"):
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 50) * cosine(step / steps)
        labels, swapped = draw_labels(BATCH, rng)
        labels = torch.cat([torch.zeros_like(labels[:1]), labels])
        states = encoder(tokens_of(words, ["", *captions_of(labels[1:], swapped)]))[0]
        reading_loss(head(states[:, -1]), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return encoder.eval().requires_grad_(False)


def kept_text_encoder(path: Path, words: Any, width: int, layers: int, seed: int, steps: int) -> Any:
    """The text encoder in the folder `path`, fitted where there is none yet."""
    if not (path / "config.json").is_file():
        fitted = fit_text_encoder(words, width, layers, seed, steps)
        with whole(path, folder=True) as partial:
            fitted.save_pretrained(partial)
    kept = import_module("transformers").CLIPTextModel.from_pretrained(path, local_files_only=True)
    return kept.eval().requires_grad_(False)


def tokens_of(words: Any, texts: Sequence[str]) -> Tensor:
    """The tokens of texts, (n, T) int64, as a pipeline has them."""
    tokens: Tensor = words(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return tokens


@torch.no_grad()
def states_of(encoder: Any, words: Any, texts: Sequence[str]) -> Tensor:
    """The states of texts, (n, T, width), as a pipeline has them."""
    return torch.cat([encoder(part)[0] for part in tokens_of(words, texts).split(BLOCK)])
