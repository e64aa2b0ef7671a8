"""Features: a classifier's, and a vision model's as its own configuration asks for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vardistill.domains.pictures.classifier import Classifier
from vardistill.domains.pictures.features import ClassifierFeatures, load_features
from vardistill.errors import UsageError

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def vision_model(folder: Path, **preprocessing: Any) -> Any:
    """A tiny DINOv2 of 14 × 14 pixels, saved in the folder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(folder)
    preprocessing = {"size": {"height": 14, "width": 14}, "image_mean": MEAN, "image_std": STD} | preprocessing
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return model


def test_a_classifier_s_folder(tmp_path: Path, rng: torch.Generator) -> None:
    classifier = Classifier((1, 8, 8), ("cat", "dog"), width=4).initialise(rng)
    classifier.save_pretrained(tmp_path / "animals")
    features, x = load_features(tmp_path / "animals"), torch.rand(5, 1, 8, 8, generator=rng)
    assert isinstance(features, ClassifierFeatures)
    assert features.name == "animals"
    assert torch.equal(features(x), classifier.features(x))
    assert not features(x).requires_grad


def test_a_vision_model_sees_standardised_pictures(tmp_path: Path, rng: torch.Generator) -> None:
    model = vision_model(tmp_path)
    features, x = load_features(tmp_path), 2 * torch.rand(5, 3, 14, 14, generator=rng) - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.no_grad():
        expected = model(pixel_values=((x + 1) / 2 - mean) / std).pooler_output
    torch.testing.assert_close(features(x), expected)
    assert features.name == str(tmp_path)
    assert not features.network.training
    grey = x[:, :1]
    torch.testing.assert_close(features(grey), features(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    "size",
    [
        {"size": {"shortest_edge": 14}},
        {"size": 14},
        {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 14, "width": 14}},
    ],
)
def test_pictures_are_resized(size: dict[str, Any], tmp_path: Path, rng: torch.Generator) -> None:
    """Pictures of one colour look the same at any size."""
    vision_model(tmp_path, **size)
    features, colours = load_features(tmp_path), torch.rand(4, 3, 1, 1, generator=rng)
    small, large = (features(colours.expand(-1, -1, side, side)) for side in (14, 50))
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-4)


def test_bad_names_and_models_are_refused(tmp_path: Path) -> None:
    vision_model(tmp_path)
    with pytest.raises(UsageError, match="1 or 3 channels, not 2"):
        load_features(tmp_path)(torch.zeros(1, 2, 14, 14))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UsageError, match="names no size"):
        load_features(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name in (tmp_path, "no/such-model"):
        with pytest.raises(UsageError, match="neither a saved classifier's folder nor a vision model"):
            load_features(name)
    for name in (tmp_path / "nothing", "nothing"):  # no id of the hub either
        with pytest.raises(UsageError, match=f"there is no folder {name}"):
            load_features(name)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match="holds no Classifier"):
        load_features(tmp_path)


def test_a_pooled_output_without_weights_is_refused(tmp_path: Path) -> None:
    """A ViT that was saved as a classifier has none for its pooling layer: they would be drawn at random."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=14, patch_size=7
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 14}')
    with pytest.raises(UsageError, match=r"no weights for pooler\.dense\.bias"):
        load_features(tmp_path)


def test_a_folders_own_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for somebody who says yes to whatever is asked."""
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = {"AutoConfig": "code_of.Config", "AutoModel": "code_of.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of-their-own", "auto_map": code}))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "code_of.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(UsageError, match="neither a saved classifier's folder nor a vision model") as caught:
        load_features(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_pictures_go_where_the_network_is() -> None:
    """The device of tensors without data stands for an accelerator."""
    features = ClassifierFeatures(Classifier((1, 8, 8), ("a", "b")))
    assert features.device == torch.device("cpu")
    assert features.to("meta") is features
    assert features.device == torch.device("meta")
    x = torch.zeros(3, 1, 8, 8)
    assert features(x).device == features.predict(x).device == torch.device("meta")
    assert features(x).shape == (3, 64)
