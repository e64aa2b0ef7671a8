"""Networks that are kept as folders, or on the Hugging Face hub, without pickles.

A folder holds `config.json`, the constructor's arguments, and `model.safetensors`, the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin

from vardistill.errors import UsageError, first_line, require_type
from vardistill.files import check_hub_id
from vardistill.hub import require_answer

TOLD = 200
"""Characters of an error of torch, which names tensor by tensor."""


class SafeHubMixin(PyTorchModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of the hub's mixin, from safetensors files only.

    `from_pretrained` refuses weights that are missing or foreign, and never opens a pickle.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Load from a folder or, where there is none of that name, from the hub.

        Raises:
            UsageError: for a path where there is no folder, or one of something else, or an id that the hub does not
                know.
        """
        source = pretrained_model_name_or_path
        require_type("a network's source", source, (str, Path), "a folder or a hub id")
        if (Path(source) / "generator").is_dir():
            raise UsageError(f"{source} is a run: its student is in {Path(source) / 'generator'}")
        if (Path(source) / "model_index.json").is_file():
            raise UsageError(
                f"{source} is a pipeline: diffusers.DiffusionPipeline.from_pretrained loads it, and as a denoiser "
                "vardistill.denoisers.from_diffusers"
            )
        if Path(source).is_dir():
            try:
                return super().from_pretrained(source, **options)
            except UsageError:
                raise
            except Exception as error:  # of arguments that its configuration lacks, of weights that are cut off
                told = first_line(error) if "\n" not in str(error) else " ".join(str(error).split())[:TOLD]
                raise UsageError(
                    f"{source} holds no {cls.__name__}: {told}; it is truncated or not one of vardistill's"
                ) from error
        check_hub_id(source)
        try:
            require_answer(str(source))
            return super().from_pretrained(source, **options)
        except UsageError:
            raise
        except Exception as error:  # of the network, the hub or the files
            raise UsageError(
                f"'{source}' is no folder here, and cannot be loaded from the Hugging Face hub: {first_line(error)}"
            ) from error

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **options: Any) -> Any:
        return super()._from_pretrained(strict=True, **options)

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Refuse what the mixin falls back to where a repository has no safetensors file."""
        raise UsageError("the weights are a pickle, which may run code when it is read: convert to model.safetensors")
