"""The CLIP score of a tiny model, against transformers' own parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

import tiny_pipelines
from vardistill.domains.text.clip import ClipScore
from vardistill.domains.text.evaluate import ByModels, spread, twice
from vardistill.errors import UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    text = CLIPTextConfig(
        vocab_size=74, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=72, eos_token_id=73, pad_token_id=73,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).eval().save_pretrained(folder)
    tiny_pipelines.tokenizer(folder / "words").save_pretrained(folder)
    settings = {"size": {"height": 8, "width": 8}, "image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_it_is_the_cosine_of_the_two_embeddings(model: Path, rng: torch.Generator) -> None:
    pictures, prompts = 2 * torch.rand(5, 3, 8, 8, generator=rng) - 1, ["a", "a dog", "x", "a cat", "a dog"]
    score, network = ClipScore(str(model)), CLIPModel.from_pretrained(model).eval()
    words = score.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = network(**words, pixel_values=((pictures + 1) / 2 - 0.4) / 0.3).logits_per_image
    expected = 100 * (logits.diagonal() / network.logit_scale.exp().detach()).clamp_min(0)
    torch.testing.assert_close(score(pictures, prompts), expected, rtol=1e-4, atol=1e-3)
    table = ByModels(prompts, score, None, None).table(pictures)
    assert table == {"clip_score": pytest.approx(float(expected.mean()), rel=1e-4), "diversity": spread(pictures)}


def test_what_is_no_clip_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot load the CLIP model"):
        ClipScore(str(tmp_path))


def test_prompts_are_asked_for_twice() -> None:
    assert twice(("a", "b"), 7) == ("a", "a", "b", "b", "a", "a", "b")


def test_diversity_is_the_difference_within_prompts() -> None:
    """Neighbours differ by 0.5 and by 1 everywhere: √((0.25 + 1)/2)."""
    pictures = torch.tensor([0.0, 0.5, 0.0, 1.0])[:, None, None, None].expand(4, 3, 2, 2)
    assert spread(pictures) == pytest.approx((1.25 / 2) ** 0.5)
    with pytest.raises(UsageError, match="at least two pictures"):
        spread(pictures[:1])
