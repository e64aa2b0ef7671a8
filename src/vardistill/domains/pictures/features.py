r"""Features of pictures, φ(x) ∈ R^f, in which sets of pictures are compared.

They are those of a `Classifier` of the same kind of pictures, or the pooled output of a vision model of Hugging Face's
`transformers` (DINOv2, ViT, CLIP, ConvNeXt, …). For the latter, pictures are resized to the network's input (bicubic,
antialiased, without cropping) and brought to the mean and standard deviation per channel that its
`preprocessor_config.json` names; grey ones have their channel three times.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vardistill.domains.pictures.classifier import Classifier, load_classifier
from vardistill.errors import UsageError
from vardistill.files import check_hub_id
from vardistill.hub import require_answer


class Features(ABC):
    """φ.

    Attributes:
        name: for tables.
        network: what computes φ, in evaluation mode.
    """

    name: str
    network: nn.Module

    @property
    def device(self) -> torch.device:
        """Where pictures are read, and where features are."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> Features:
        """Move the network; returns these features."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """φ(x) (B, f), float32, on the network's device; x (B, C, H, W) in [−1, 1]."""
        parameter = next(self.network.parameters())
        return self._features(x.to(parameter)).float()

    @abstractmethod
    def _features(self, x: Tensor) -> Tensor: ...


class ClassifierFeatures(Features):
    """The penultimate layer of a classifier."""

    def __init__(self, classifier: Classifier, name: str = "classifier") -> None:
        self.network = self.classifier = classifier.eval()
        self.name = name

    def _features(self, x: Tensor) -> Tensor:
        return self.classifier.features(x)

    def predict(self, x: Tensor) -> Tensor:
        """The likeliest class of x (B, C, H, W), (B,) int64, on the network's device."""
        return self.classifier.predict(x.to(next(self.classifier.parameters())))


class VisionModelFeatures(Features):
    """The pooled output of a vision model.

    Args:
        network: of `transformers`, with a pooled output.
        size: rows and columns of its input.
        mean: per channel, of pictures in [0, 1].
        std: per channel.
        name: for tables.
    """

    def __init__(self, network: nn.Module, size: tuple[int, int], mean: Tensor, std: Tensor, name: str) -> None:
        self.network, self.size, self.mean, self.std, self.name = network.eval(), size, mean, std, name

    def _features(self, x: Tensor) -> Tensor:
        if x.shape[1] not in (1, len(self.mean)):
            raise UsageError(f"{self.name} reads pictures of 1 or {len(self.mean)} channels, not {x.shape[1]}")
        pooled: Tensor = self.network(pixel_values=prepared(x, self.size, self.mean, self.std)).pooler_output
        return pooled.flatten(1)


def prepared(x: Tensor, size: tuple[int, int], mean: Tensor, std: Tensor) -> Tensor:
    """Pictures (B, C, H, W) in [−1, 1] as a vision model reads them, (B, len(mean), *size)."""
    if tuple(x.shape[2:]) != size:
        x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)
    return ((x + 1) / 2 - mean.to(x)[:, None, None]) / std.to(x)[:, None, None]


def load_features(name: str | Path) -> Features:
    """Features by name.

    Args:
        name: the folder of a saved `Classifier` or vision model, or a vision model's name on the Hugging Face hub.

    Raises:
        UsageError: for a model that is not there, truncated, of another kind, or without trained weights for its
            pooled output; without `transformers` where it is needed.
    """
    path = Path(name)
    if path.is_dir() and "model_type" not in _json(path / "config.json"):
        return ClassifierFeatures(load_classifier(path), path.resolve().name)
    if not path.is_dir():
        check_hub_id(name)
    return _load_vision_model(str(name))


def _load_vision_model(name: str) -> VisionModelFeatures:
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise UsageError(f"features of '{name}' need transformers: pip install 'vardistill[features]'") from error
    try:
        if not Path(name).is_dir():
            require_answer(name)
        preprocessor_config(name)
        options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
        network, loading = AutoModel.from_pretrained(name, **options)
    except Exception as error:  # of the network, the hub or the files
        raise UsageError(
            f"'{name}' is neither a saved classifier's folder nor a vision model of the Hugging Face hub: "
            f"{' '.join(str(error).split())}"
        ) from error
    if loading["missing_keys"] or loading["mismatched_keys"]:
        missing = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
        raise UsageError(
            f"'{name}' has no weights for {missing[0]} and {len(missing) - 1} more: its features are random"
        )
    network = getattr(network, "vision_model", network)  # of CLIP and its kin, the half that sees
    return VisionModelFeatures(network, *preprocessing(name), name)


def preprocessor_config(name: str) -> dict[str, Any]:
    """What a vision model's folder or hub repository says of its input; raises the hub's errors."""
    from transformers.utils.hub import cached_file

    return _json(Path(str(cached_file(name, "preprocessor_config.json"))))


def preprocessing(name: str) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Rows and columns, mean and standard deviation of a vision model's input.

    Raises:
        UsageError: for a configuration that names no size.
    """
    config = preprocessor_config(name)
    size = config.get("crop_size") if config.get("do_center_crop") else config.get("size")
    if not isinstance(size, dict):
        size = {"shortest_edge": size}
    height, width = (size.get(side, size.get("shortest_edge")) for side in ("height", "width"))
    if not (isinstance(height, int) and isinstance(width, int)):
        raise UsageError(f"the preprocessor_config.json of '{name}' names no size of the input")
    mean, std = (torch.tensor(config.get(key, [0.5] * 3)) for key in ("image_mean", "image_std"))
    return (height, width), mean, std


def _json(path: Path) -> dict[str, Any]:
    """A file's contents; nothing of a file that is missing or no JSON object."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}
