r"""CLIP score (Hessel et al. 2021, arXiv 2104.08718): how well pictures fit their prompts, as a CLIP model sees it.

100 · max(0, cos(E_picture(x), E_text(c)))
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vardistill.domains.pictures.features import prepared, preprocessing
from vardistill.errors import UsageError, first_line
from vardistill.files import check_hub_id
from vardistill.hub import require_answer

BLOCK = 64
"""Pictures and prompts that are embedded at once."""


class ClipScore:
    """Scores of pictures under prompts.

    Args:
        name: a CLIP model's folder or hub id, with its tokenizer and `preprocessor_config.json`.

    Raises:
        UsageError: where it cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        try:
            transformers = import_module("transformers")
            if not Path(name).is_dir():
                check_hub_id(name)
                require_answer(name)
            options = {"use_safetensors": True, "trust_remote_code": False}
            self.network = transformers.CLIPModel.from_pretrained(name, **options).eval().requires_grad_(False)
            self.tokenizer = transformers.CLIPTokenizer.from_pretrained(name)
            self.preprocessing = preprocessing(name)
        except Exception as error:  # of the network, the hub or the files
            raise UsageError(f"cannot load the CLIP model {name}: {first_line(error)}") from error

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """(n,) of pictures (n, 3, H, W) in [−1, 1] and as many prompts."""
        found = []
        for part in torch.arange(len(pictures)).split(BLOCK):
            words = self.tokenizer(
                [prompts[i] for i in part.tolist()], padding=True, truncation=True, return_tensors="pt"
            )
            seen = self.network.get_image_features(pixel_values=prepared(pictures[part], *self.preprocessing))
            told = self.network.get_text_features(**words)
            found.append(100 * F.cosine_similarity(pooled(seen), pooled(told)).clamp_min(0))
        return torch.cat(found)


def pooled(output: Tensor) -> Tensor:
    """The embedding itself, which newer versions of transformers return within an output."""
    return output if isinstance(output, Tensor) else output.pooler_output
