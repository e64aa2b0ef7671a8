"""A hub that does not answer is told of at once; what was downloaded before needs none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.hub_mixin
import pytest
from huggingface_hub import constants

from vardistill import hub
from vardistill.denoisers import from_diffusers
from vardistill.domains.pictures.features import load_features
from vardistill.domains.pictures.sources import load_images
from vardistill.errors import UsageError
from vardistill.students import MLP

SILENT = "the Hugging Face hub does not answer: no route"


class Session:
    """Of HTTP."""

    def __init__(self, answers: bool) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def head(self, url: str, timeout: float) -> None:
        assert timeout == hub.PATIENCE
        self.asked.append(url)
        if not self.answers:
            raise OSError("no route\nto host")


@pytest.fixture
def session(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """In the place of the hub's, with nothing in its cache; `request.param`: whether it answers."""
    found = Session(request.param)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: found)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return found


@pytest.mark.parametrize("session", [True], indirect=True)
def test_a_hub_that_answers_is_asked_once(session: Session) -> None:
    hub.require_answer("a/b")
    assert session.asked == [constants.ENDPOINT]


@pytest.mark.parametrize("session", [False], indirect=True)
def test_what_was_downloaded_before_needs_no_hub(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConnectionError, match=f"^{SILENT}$"):
        hub.require_answer("a/b")
    (tmp_path / "cache" / "models--a--b").mkdir(parents=True)
    hub.require_answer("a/b")
    with pytest.raises(ConnectionError, match=f"^{SILENT}$"):
        hub.require_answer("a/b", "dataset")
    (tmp_path / "cache" / "datasets--a--b").mkdir()
    hub.require_answer("a/b", "dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.require_answer("c/d")  # whose client says so itself
    assert len(session.asked) == 2


@pytest.mark.parametrize("session", [False], indirect=True)
@pytest.mark.parametrize(
    "load",
    [from_diffusers, MLP.from_pretrained, load_features, lambda name: load_images(f"hf:{name}")],
    ids=["from_diffusers", "from_pretrained", "load_features", "load_images"],
)
def test_the_hubs_client_is_not_left_to_try_again_and_again(
    load: Any, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*ignored: Any, **options: Any) -> None:
        pytest.fail("asked the hub")

    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", asked)
    monkeypatch.setattr(datasets, "load_dataset", asked)
    monkeypatch.setattr("transformers.utils.hub.cached_file", asked)
    with pytest.raises(UsageError, match=SILENT) as told:
        load("a/b")
    assert "\n" not in str(told.value)
    assert session.asked == [constants.ENDPOINT]
