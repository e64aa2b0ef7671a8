"""Weights come from safetensors files only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.hub_mixin
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from tiny_models import tiny_unet
from vardistill.denoisers import DiffusersDenoiser
from vardistill.domains.pictures.classifier import Classifier
from vardistill.errors import UsageError
from vardistill.students import hub
from vardistill.students.network import NetworkStudent
from vardistill.students.perceptron import MLP


def student() -> NetworkStudent:
    return NetworkStudent.from_teacher(DiffusersDenoiser(tiny_unet(), diffusers.EDMEulerScheduler()))


@pytest.mark.parametrize(
    "network",
    [lambda: MLP(depth=1, width=4), lambda: Classifier((1, 8, 8), ("a", "b"), width=4), student],
    ids=["MLP", "Classifier", "NetworkStudent"],
)
def test_a_repository_of_pickles_alone_is_refused_unopened(
    network: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = network()
    own.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(own.state_dict(), tmp_path / "pytorch_model.bin")

    def download(repo_id: str, filename: str, **options: object) -> str:
        if not (tmp_path / filename).is_file():
            raise LocalEntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "require_answer", lambda repository: None)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    with pytest.raises(UsageError, match="the weights are a pickle") as caught:
        type(own).from_pretrained("somebody/network")
    assert "\n" not in str(caught.value)


def test_a_path_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(repo_id: str, **options: Any) -> str:
        asked.append(repo_id)
        raise OSError("offline")

    monkeypatch.setattr(hub, "require_answer", lambda repository: None)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/none", Path("a/b"), "/nope/dir", "nope"):
        with pytest.raises(UsageError, match=f"there is no folder {path}"):
            MLP.from_pretrained(path)
    assert asked == []
    with pytest.raises(
        UsageError, match="'a/b' is no folder here, and cannot be loaded from the Hugging Face hub: "
    ) as told:
        MLP.from_pretrained("a/b")
    assert "\n" not in str(told.value)
    assert set(asked) == {"a/b"}


def test_folders_of_something_else_name_what_loads_them(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UsageError, match="is a pipeline: diffusers.DiffusionPipeline.from_pretrained loads it"):
        MLP.from_pretrained(tmp_path)
    MLP(depth=1, width=8).save_pretrained(tmp_path / "mlp")
    with pytest.raises(UsageError, match="holds no NetworkStudent"):
        NetworkStudent.from_pretrained(tmp_path / "mlp")


def test_folders_without_such_a_network_say_what_they_lack(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no MLP: No such file or directory: .*model\.safetensors"):
        MLP.from_pretrained(tmp_path)
    MLP(depth=1, width=4).save_pretrained(tmp_path / "generator")
    with pytest.raises(UsageError, match=r"is a run: its student is in .*generator$"):
        MLP.from_pretrained(tmp_path)
    config = tmp_path / "generator" / "config.json"
    config.write_text(config.read_text().replace('"width": 4', '"width": 5'))
    with pytest.raises(UsageError, match=r"holds no MLP: .*size mismatch") as other:
        MLP.from_pretrained(tmp_path / "generator")
    assert "\n" not in str(other.value)
    weights = tmp_path / "generator" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UsageError, match="holds no MLP: "):
        MLP.from_pretrained(tmp_path / "generator")
