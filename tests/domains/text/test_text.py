"""Text to image: prompts are labels, their conditions those of the pipeline's own encoders."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import tiny_pipelines
from vardistill.cli import main as cli
from vardistill.cli.view import load_pair
from vardistill.denoisers import Guided, from_diffusers
from vardistill.denoisers.prompted import Conditions, prompted
from vardistill.domains.text.families import cut, decoded, encoded, load_pipeline
from vardistill.domains.text.prompts import read_prompts
from vardistill.errors import UsageError
from vardistill.reports.view import Wish, _data_uri
from vardistill.runs.config import Config
from vardistill.runs.experiment import build_domain, check, load_run
from vardistill.runs.presets import PRESETS, TEXT
from vardistill.students import NetworkStudent

PROMPTS = ("a red dog", "a blue cat", "a")
QUICK = ["--batch", "8", "--eval-samples", "20", "--device", "cpu", "--tracker", "none"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in tiny_pipelines.MAKERS.items()}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def config(name: str, teacher: Path, prompts: Path, **changes: Any) -> Config:
    preset = PRESETS[name].config
    training = replace(preset.training, steps=2, batch=8, device="cpu", tracker="none", eval_samples=20)
    return replace(
        preset, domain=replace(preset.domain, teacher=str(teacher), prompts=str(prompts), **changes), training=training
    )


def network_call(pipeline: Any, x: torch.Tensor, time: torch.Tensor, prompt: str) -> torch.Tensor:
    """The network's prediction under a prompt, as the pipeline itself calls it."""
    text = [prompt] * len(x)
    if isinstance(pipeline, diffusers.StableDiffusion3Pipeline):
        states, _, pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False)
        given = {"encoder_hidden_states": states, "pooled_projections": pooled}
        return pipeline.transformer(hidden_states=x, timestep=time, return_dict=False, **given)[0]
    found = pipeline.encode_prompt(text, pipeline.device, 1, False) if not hasattr(pipeline, "text_encoder_2") else None
    if found is not None:
        return pipeline.unet(x, time, encoder_hidden_states=found[0], return_dict=False)[0]
    states, _, pooled, _ = pipeline.encode_prompt(text, device=pipeline.device, do_classifier_free_guidance=False)
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(x))
    added = {"text_embeds": pooled, "time_ids": ids}
    return pipeline.unet(x, time, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)[0]


@pytest.mark.parametrize("family", tiny_pipelines.MAKERS)
@torch.no_grad()
def test_a_label_is_what_the_pipeline_tells_its_network_of_the_prompt(family: str, folders: dict[str, Path]) -> None:
    """In whatever company it is encoded; and E[x | x_t] from the same prediction as the pipeline's own call."""
    pipeline = load_pipeline(str(folders[family]))
    rows = encoded(pipeline, PROMPTS)
    again = encoded(pipeline, PROMPTS[1:2])
    for name, v in rows.items():
        assert v.shape[0] == len(PROMPTS) + 1
        torch.testing.assert_close(v[[1, -1]], again[name], rtol=1e-5, atol=1e-6)
    denoiser = prompted(from_diffusers(folders[family]), Conditions(rows))
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 0.5])
    alpha, sigma = (v[:, None, None, None] for v in denoiser.schedule(t))
    time = t * (1000 if family == "sd3" else 999)
    prediction = network_call(pipeline, x, time, PROMPTS[1])
    wanted = x - sigma * prediction if family == "sd3" else (x - sigma * prediction) / alpha
    torch.testing.assert_close(denoiser(x, t, labels=torch.tensor([1, 1])), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_guidance_is_by_the_empty_prompt(folders: dict[str, Path]) -> None:
    """D_∅ + w (D_c − D_∅); none for w = 1."""
    rows = encoded(load_pipeline(str(folders["sd"])), PROMPTS)
    denoiser = prompted(from_diffusers(folders["sd"]), Conditions(rows))
    x, t, y = torch.randn(3, 4, 8, 8), torch.full((3,), 0.3), torch.tensor([0, 1, 2])
    assert denoiser.null_label == 3
    told, untold = denoiser(x, t, labels=y), denoiser(x, t, labels=torch.full((3,), 3))
    guided = Guided(denoiser, 4.0, {"labels": denoiser.null_label})(x, t, labels=y)
    torch.testing.assert_close(guided, untold + 4 * (told - untold), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(Guided(denoiser, 1.0, {"labels": 3})(x, t, labels=y), told)


def test_copies_share_the_conditions(folders: dict[str, Path]) -> None:
    rows = encoded(load_pipeline(str(folders["sd"])), PROMPTS)
    denoiser = prompted(from_diffusers(folders["sd"]), Conditions(rows))
    assert copy.deepcopy(denoiser).conditions is denoiser.conditions
    assert not any("encoder_hidden_states" in name for name in denoiser.state_dict())


@torch.no_grad()
def test_latents_are_decoded_as_the_pipeline_does(folders: dict[str, Path]) -> None:
    for family in ("sd", "sd3"):
        pipeline = load_pipeline(str(folders[family]))
        z = 0.2 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        shift = getattr(pipeline.vae.config, "shift_factor", None) or 0.0
        wanted = pipeline.vae.decode(z).sample.clamp(-1, 1)
        torch.testing.assert_close(decoded(pipeline.vae, (z - shift) * pipeline.vae.config.scaling_factor), wanted)


def test_prompts_that_the_tokenizer_cuts_are_told(folders: dict[str, Path]) -> None:
    long = "a very long prompt of many letters"
    assert cut(load_pipeline(str(folders["sd"])), [*PROMPTS, long]) == [long]


def test_prompts_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa  dog\r\n\r\na cat\na dog\nКот\n".encode())
    found = read_prompts(path)
    assert found.texts == ("a dog", "a cat", "Кот")
    assert found.told == "3 prompts (left out: 1 empty, 1 repeated)"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
        (b"\xff\xfe\x00", "no text in UTF-8"),
        (b"a\0b", "zeros"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UsageError, match=told):
        read_prompts(tmp_path / "x.txt")
    with pytest.raises(UsageError, match="cannot read the prompts"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("name", [f"text-{name}" for name in TEXT])
def test_every_preset_builds(name: str, folders: dict[str, Path], prompts: Path) -> None:
    job = config(name, folders["sd"], prompts)
    check(job, build_domain(job))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompts": ""}, "no prompts: give --prompts, FILE.txt with one a line, FILE.csv:COLUMN"),
        ({"teacher": ""}, "no teacher: give --teacher, a pipeline's folder"),
    ],
)
def test_what_is_missing_is_told(changes: dict[str, str], told: str, folders: dict[str, Path], prompts: Path) -> None:
    job = config("text-varflow", folders["sd"], prompts)
    with pytest.raises(UsageError, match=told):
        build_domain(replace(job, domain=replace(job.domain, **changes)))


def test_pipelines_of_other_kinds_are_refused(tmp_path: Path, prompts: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    job = config("text-varflow", tmp_path, prompts)
    with pytest.raises(UsageError, match="is a DDPMPipeline, but text to image takes one of StableDiffusionPipeline"):
        check(job, build_domain(job))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.run(list(words)) == 2
    return capsys.readouterr().err


@torch.no_grad()
def the_pipeline_is_the_student(
    run: Path, kind: str, teacher: Path, student: NetworkStudent, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the lines that the export prints, and its own encoders."""
    capsys.readouterr()
    assert cli.run(["export", str(run), "--to", kind]) == 0
    _, lines = capsys.readouterr().out.split(":\n\n", 1)
    names: dict[str, Any] = {"pipeline": load_pipeline(str(teacher)), "prompt": [PROMPTS[1]] * 2}
    z = names["z"] = student.latents(2, torch.Generator().manual_seed(3))
    torch.manual_seed(4)
    rng = names["rng"] = torch.Generator().manual_seed(4)
    exec(
        lines.strip().replace("pipeline(prompt,", "pipeline(prompt, latents=z, generator=rng, output_type='latent',"),
        names,
    )
    rng.manual_seed(4)
    own = student(z, torch.randn(student.steps - 1, *z.shape, generator=rng), labels=torch.tensor([1, 1]))
    torch.testing.assert_close(names["pictures"], own, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "preset", "words"),
    [
        ("sd", "text-diff-instruct", ["--lora-rank", "2"]),
        ("sdxl", "text-varflow", ["--real-samples", "6", "--real-steps", "2"]),
        ("sd3", "text-diff-instruct", ["--steps-per-sample", "2"]),
    ],
)
def test_from_prompts_to_pictures(
    family: str, preset: str, words: list[str], folders: dict[str, Path], prompts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Trained, gone on with, sampled by a prompt of its own; the encoders have run once."""
    run, teacher = tmp_path / "run", str(folders[family])
    start = ["train", preset, "--teacher", teacher, "--prompts", str(prompts), "--steps", "2", *QUICK, *words]
    assert cli.run([*start, "--out", str(run)]) == 0
    kept = (run / "conditions.safetensors").stat().st_mtime_ns
    assert len(load_file(run / "conditions.safetensors")["encoder_hidden_states"]) == len(PROMPTS) + 1
    assert cli.run(["train", "--resume", str(run), "--steps", "3"]) == 0
    assert (run / "conditions.safetensors").stat().st_mtime_ns == kept
    assert "evaluations" in json.loads((run / "evaluation.json").read_text())
    _, _, student = load_run(run)
    assert isinstance(student, NetworkStudent)
    own = student.sample(3, seed=5, labels=torch.tensor([1, 1, 1]))
    wanted = decoded(load_pipeline(teacher).vae, own)
    out = tmp_path / "dogs.npz"
    assert cli.run(["sample", str(run), "--num", "3", "--seed", "5", "--prompt", PROMPTS[1], "--out", str(out)]) == 0
    import numpy as np

    torch.testing.assert_close(torch.from_numpy(np.load(out)["samples"]), wanted, rtol=1e-4, atol=1e-4)
    for kind in ("diffusers", *(["lora"] if "--lora-rank" in words else [])):
        the_pipeline_is_the_student(run, kind, Path(teacher), student, capsys)
    assert "one of them" in refused(capsys, "sample", str(run), "--prompt", "x", "--label", "0")
    pair = load_pair(run)
    by_hand = student.sample(2, seed=7, labels=torch.tensor([1, 1]))
    shown = pair.pictures(Wish(seed=7, count=2, steps=1, prompt=PROMPTS[1], guidance=1.0))
    assert shown["student"] is not None
    assert shown["teacher"] is not None
    assert shown["student"]["picture"] == _data_uri(decoded(load_pipeline(teacher).vae, by_hand))
