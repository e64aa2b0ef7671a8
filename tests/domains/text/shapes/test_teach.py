"""A teacher of shapes: its tokenizer, its pipeline as diffusers loads it, and students of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from vardistill.cli import main as cli
from vardistill.domains.text.families import encoded, in_latents, load_pipeline
from vardistill.domains.text.shapes import evaluate as evaluate_module, judge as judge_module, teach as teach_module
from vardistill.domains.text.shapes.autoencoder import autoencoder_loss, encoded_pictures
from vardistill.domains.text.shapes.encoder import fit_text_encoder, states_of, tokens_of
from vardistill.domains.text.shapes.evaluate import Truth, asked_twice
from vardistill.domains.text.shapes.formula import (
    WORDS,
    attributes,
    captions,
    captions_of,
    draw_labels,
    draw_pictures,
    labels_of,
    scenes,
)
from vardistill.domains.text.shapes.judge import Judge, load_judge
from vardistill.domains.text.shapes.networks import TOKENS, autoencoder, tokenizer
from vardistill.files import remove
from vardistill.runs.config import Config
from vardistill.runs.experiment import build_domain, check
from vardistill.runs.presets import PRESETS, SHAPES, with_objective

TINY = [
    "--pictures",
    "60",
    "--kept",
    "40",
    "--autoencoder-steps",
    "2",
    "--text-steps",
    "2",
    "--batch",
    "4",
    "--channels",
    "8",
    "16",
]
QUICK = ["--batch", "8", "--eval-samples", "12", "--device", "cpu", "--tracker", "none"]


@pytest.fixture(scope="module", autouse=True)
def little() -> Iterator[None]:
    """Judges that learn nothing, measured on few pictures, and teachers by few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_module, "HELD_OUT", 50)
        patch.setattr(judge_module.fit_judge, "__defaults__", (2, 8, 1e-3))
        patch.setattr(evaluate_module, "REFERENCE", 400)
        patch.setattr(teach_module, "STEPS", (2, 3))
        yield


@pytest.fixture(scope="module")
def teacher(little: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a few steps."""
    out = tmp_path_factory.mktemp("shapes") / "teacher"
    words = ["--steps", "2", "--eval-samples", "12", "--checkpoint-every", "1", "--device", "cpu"]
    assert cli.run(["teach", "shapes", "--out", str(out), *TINY, *words]) == 0
    return out


def test_every_word_is_a_token_and_captions_are_not_cut(rng: torch.Generator) -> None:
    words = tokenizer()
    for word in WORDS:
        assert len(words(word).input_ids) == 3, word
    texts = captions(500, rng)
    tokens = tokens_of(words, texts)
    assert tokens.shape == (500, TOKENS)
    assert (tokens[:, -1] == words.eos_token_id).all()
    assert words.batch_decode(tokens, skip_special_tokens=True) == list(texts)
    assert len(tokens.unique(dim=0)) == len(set(texts))


def test_diffusers_samples_the_pipeline_alone(teacher: Path) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(teacher / "pipeline")
    assert isinstance(pipeline, diffusers.StableDiffusionPipeline)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        list(captions(2, torch.Generator().manual_seed(0))), num_inference_steps=2, output_type="pt"
    ).images
    assert pictures.shape == (2, 3, 32, 32)


def test_the_folder_has_what_students_need(teacher: Path) -> None:
    table = json.loads((teacher / "evaluation.json").read_text())
    assert list(table) == ["2 steps", "3 steps"]
    assert table["2 steps"].keys() >= {"prompt_accuracy", "fd", "diversity", "guidance", "evaluations"}
    assert len((teacher / "pictures" / "metadata.jsonl").read_text().splitlines()) == 40
    load_judge(teacher / "judge")


def test_kept_pictures_are_others_than_the_teachers(teacher: Path) -> None:
    own = scenes(60, torch.Generator().manual_seed(0)).captions
    kept = [json.loads(line)["text"] for line in (teacher / "pictures" / "metadata.jsonl").read_text().splitlines()]
    assert len(set(own) & set(kept)) < 10


@torch.no_grad()
def test_latents_have_unit_variance_in_the_pipelines_scale(teacher: Path) -> None:
    """Up to the error of 500 pictures' variance."""
    vae = load_pipeline(str(teacher / "pipeline")).vae
    rng = torch.Generator().manual_seed(5)
    latents = in_latents(vae, scenes(500, rng).pictures.split(100), rng)
    assert latents.shape == (500, 16, 8, 8)
    assert float(latents.var()) == pytest.approx(1, abs=0.05)


def test_the_autoencoders_loss(rng: torch.Generator) -> None:
    """Its three parts by hand, of the same noise."""
    network, x = autoencoder(0), scenes(4, rng).pictures
    loss = autoencoder_loss(network, x, torch.Generator().manual_seed(1))
    mean, std = encoded_pictures(network, x)
    z = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    error = network.decode(z).sample - x
    divergence = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
    torch.testing.assert_close(loss, error.square().mean() + 0.1 * error.abs().mean() + 1e-5 * divergence)


@pytest.mark.slow
def test_a_teacher_that_is_stopped_ends_as_an_unbroken_one(teacher: Path, tmp_path: Path) -> None:
    words = ["--steps", "1", "--eval-samples", "12", "--checkpoint-every", "1", "--device", "cpu"]
    out = tmp_path / "cut"
    assert cli.run(["teach", "shapes", "--out", str(out), *TINY, *words]) == 0
    for name in ("pipeline", "evaluation.json", "judge", "pictures"):
        remove(out / name)
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("\nsteps: 1\n", "\nsteps: 2\n"))
    assert cli.run(["teach", "--resume", str(out)]) == 0
    for part in ("unet", "text_encoder", "vae"):
        own, whole = (next((root / "pipeline" / part).glob("*.safetensors")).read_bytes() for root in (out, teacher))
        assert own == whole
    assert (out / "evaluation.json").exists()


def config(name: str, teacher: Path) -> Config:
    preset = PRESETS[f"shapes-{name}"].config
    training = replace(preset.training, steps=1, batch=8, device="cpu", tracker="none", eval_samples=12)
    return replace(preset, domain=replace(preset.domain, teacher=str(teacher)), training=training)


class TestStudents:
    @pytest.mark.slow
    def test_a_student_is_judged(self, teacher: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        words = ["--teacher", str(teacher), "--steps", "2", *QUICK, "--out", str(run)]
        assert cli.run(["train", "shapes-varflow", *words]) == 0
        table = json.loads((run / "evaluation.json").read_text())
        assert table.keys() >= {"prompt_accuracy", "fd", "diversity", "evaluations", "seconds_per_image"}
        out = tmp_path / "x.png"
        caption = captions(1, torch.Generator().manual_seed(3))[0]
        assert cli.run(["sample", str(run), "--num", "2", "--prompt", caption, "--out", str(out)]) == 0
        assert cli.run(["evaluate", str(run), "--num", "12"]) == 0

    @pytest.mark.parametrize("name", SHAPES)
    def test_every_preset_builds(self, name: str, teacher: Path) -> None:
        job = config(name, teacher)
        check(job, build_domain(job))

    @pytest.mark.parametrize(("space", "views"), [("teacher", 0), ("teacher-blocks", 5), ("classifier", 0)])
    def test_varflow_in_every_space(self, space: str, views: int, teacher: Path) -> None:
        job = with_objective(config("varflow", teacher), f"varflow(space={space}, real=data)")
        domain = build_domain(job)
        check(job, domain)
        found = domain.space(space)(torch.randn(2, *domain.student.data_shape), torch.tensor([0.2, 0.4]))
        assert len(found) == views if views else found.shape[0] == 2

    def test_prompts_without_pictures_are_refused(
        self, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a horse\n")
        words = ["--teacher", str(teacher), "--prompts", str(prompts), "--steps", "1", *QUICK]
        assert cli.run(["train", "shapes-varflow", *words, "--out", str(tmp_path / "run")]) == 2
        assert "1 of the prompts have no picture: leave out --prompts" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_an_unfinished_teacher_is_told(
        self, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        begun = tmp_path / "begun"
        begun.mkdir()
        (begun / "config.yaml").write_text((teacher / "config.yaml").read_text())
        assert cli.run(["train", "shapes-varflow", "--teacher", str(begun), *QUICK]) == 2
        assert "no finished teacher yet: go on with `vardistill teach --resume" in capsys.readouterr().err


@pytest.fixture(scope="module")
def judge(teacher: Path) -> Judge:
    return load_judge(teacher / "judge")


class TestTruth:
    """What the formula's own pictures score, with a judge that was never taught."""

    def test_the_formulas_pictures_are_as_diverse_as_the_truth(self, judge: Judge) -> None:
        prompts = asked_twice(400, 1)
        truth = Truth(judge, prompts, 2)
        found = draw_pictures(labels_of(prompts), torch.Generator().manual_seed(3))
        table = truth.table(found)
        assert table["diversity"] == pytest.approx(1, abs=0.1)
        assert table["fd"] < truth.table(found.flip(2))["fd"] + 1e-6
        assert truth.table(found[::2].repeat_interleave(2, 0))["diversity"] == 0

    def test_prompts_are_asked_twice(self) -> None:
        prompts = asked_twice(7, 0)
        assert len(prompts) == 7
        assert prompts[0] == prompts[1] != prompts[2]


def test_conditions_of_a_caption_do_not_depend_on_its_company(teacher: Path) -> None:
    pipeline = load_pipeline(str(teacher / "pipeline"))
    texts = captions(5, torch.Generator().manual_seed(0))
    whole, alone = (encoded(pipeline, part)["encoder_hidden_states"] for part in (texts, texts[2:3]))
    torch.testing.assert_close(whole[[2, -1]], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_text_encoders_last_state_tells_what_captions_say() -> None:
    """A linear map of it, fitted to some captions, tells place and colour of unseen ones; chance is one in sixteen."""
    words = tokenizer()
    encoder = fit_text_encoder(words, 64, 2, 0, steps=200)
    labels, swapped = draw_labels(1000, torch.Generator().manual_seed(7))
    states = states_of(encoder, words, captions_of(labels, swapped))[:, -1]
    first = (labels > 0).int().argmax(1)
    wanted = 4 * first + attributes(labels)[1][torch.arange(1000), first]
    inputs = torch.cat([states, torch.ones(1000, 1)], 1)
    fitted = torch.linalg.lstsq(inputs[:700], torch.nn.functional.one_hot(wanted[:700], 16).float()).solution
    assert float(((inputs[700:] @ fitted).argmax(1) == wanted[700:]).float().mean()) > 0.75
