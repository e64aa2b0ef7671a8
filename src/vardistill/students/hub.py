"""Networks that are kept as folders, or on the Hugging Face hub, without pickles.

A folder holds `config.json`, the constructor's arguments, and `model.safetensors`, the weights.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub import PyTorchModelHubMixin

from vardistill.errors import UsageError


class SafeHubMixin(PyTorchModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of the hub's mixin, from safetensors files only.

    `from_pretrained` refuses weights that are missing or foreign, and never opens a pickle.
    """

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **options: Any) -> Any:
        return super()._from_pretrained(strict=True, **options)

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Refuse what the mixin falls back to where a repository has no safetensors file."""
        raise UsageError("the weights are a pickle, which may run code when it is read: convert to model.safetensors")
