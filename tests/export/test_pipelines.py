"""Pipelines that diffusers loads without vardistill: the same pictures from the same noise, and the same denoiser back.

Random networks amplify noise, so a part of their pictures is clipped; the rest, at least a fifth, is compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from tiny_models import tiny_dit, tiny_unet
from vardistill.denoisers import DiffusersDenoiser, from_diffusers
from vardistill.diffusion.samplers import karras_times, sample
from vardistill.errors import UsageError
from vardistill.export import export_diffusers
from vardistill.export.pipelines import sampler, save_pipeline, usage_of
from vardistill.export.templates.pipeline import ImagePipeline
from vardistill.students.network import NetworkStudent

N, SEED, STEPS = 16, 3, 4

TEACHERS: dict[str, Any] = {
    "epsilon": lambda: (tiny_unet(channels=3), diffusers.DDPMScheduler(clip_sample=False)),
    "v": lambda: (tiny_unet(), diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
    "sample": lambda: (
        tiny_unet(),
        diffusers.DPMSolverMultistepScheduler(prediction_type="sample", beta_schedule="scaled_linear"),
    ),
    "labels": lambda: (tiny_unet(classes=4), diffusers.DDPMScheduler(clip_sample=False)),
    "edm": lambda: (tiny_unet(classes=4), diffusers.EDMEulerScheduler(sigma_max=20.0, sigma_data=0.4)),
    "edm-v": lambda: (tiny_unet(), diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction")),
    "flow": lambda: (tiny_unet(), diffusers.FlowMatchHeunDiscreteScheduler(num_train_timesteps=500, shift=3.0)),
    "dit": lambda: (tiny_dit(channels=1), diffusers.DDIMScheduler()),
    "variance": lambda: (
        tiny_unet(channels=3, out_channels=6),
        diffusers.DDPMScheduler(variance_type="learned_range"),
    ),
    "variance-labels": lambda: (
        tiny_unet(classes=3, out_channels=2),
        diffusers.DDIMScheduler(prediction_type="v_prediction"),
    ),
    "latents": lambda: (tiny_unet(channels=4), diffusers.DDPMScheduler()),
    "latents-flow": lambda: (tiny_unet(channels=4, classes=2), diffusers.FlowMatchEulerDiscreteScheduler()),
    "latents-of-vae": lambda: (tiny_unet(channels=3), diffusers.PNDMScheduler()),
    "clipped": lambda: (
        tiny_unet(),
        diffusers.DDPMScheduler(clip_sample_range=0.3, thresholding=True, sample_max_value=1.5),
    ),
    "wide": lambda: (tiny_unet(size=(4, 8)), diffusers.EulerDiscreteScheduler()),
}
NUMBERS = (1, 4)

every_teacher = pytest.mark.parametrize("name", TEACHERS)

ALONE = """
import json, sys
sys.modules["vardistill"] = None
import diffusers, numpy, torch
diffusers.utils.logging.disable_progress_bar()
made = {}
for folder, lines in json.load(sys.stdin):
    load, draw = lines.rsplit("\\n", 1)
    exec(load)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(SEED)
    exec(draw)
    if draw.startswith("pictures"):
        made[folder + "-pil"] = numpy.stack([numpy.asarray(p, numpy.float32) / 255 for p in pictures])
        torch.manual_seed(SEED)
        exec(draw.replace("batch_size=16", "batch_size=16, output_type='pt'"))
    made[folder] = numpy.asarray(pictures if draw.startswith("pictures") else latents)
numpy.savez(sys.argv[1], **made)
"""


def teacher(name: str) -> DiffusersDenoiser:
    return DiffusersDenoiser(*TEACHERS[name]()).eval()


def folder_of(name: str, path: Path) -> Path:
    """The teacher as diffusers alone saves it."""
    network, scheduler = TEACHERS[name]()
    part = "transformer" if name.endswith("dit") else "unet"
    parts = {part: network, "scheduler": scheduler}
    for key, module in parts.items():
        module.save_pretrained(path / key)
    index = {key: ["diffusers", type(module).__name__] for key, module in parts.items()}
    if name.endswith("vae"):
        index["vae"] = ["diffusers", "AutoencoderKL"]
    (path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **index}))
    return path


def moved(source: DiffusersDenoiser, steps: int, adapters: bool) -> NetworkStudent:
    """A student whose weights, or adapters, are no longer those that it started with."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        s = NetworkStudent.from_teacher(source, steps=steps, rank=2 if adapters else 0)
        for parameter in s.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    return s.eval()


def student(name: str, steps: int = 1) -> NetworkStudent:
    return NetworkStudent.from_teacher(teacher(name), steps=steps).eval()


def save(s: NetworkStudent, path: Path) -> None:
    save_pipeline(s.denoiser, path, s.times, s.classes)


def condition(classes: int) -> dict[str, Tensor]:
    return {"labels": torch.arange(N) % classes} if classes else {}


def seen(x: Tensor) -> Tensor:
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor | None, Tensor]]:
    """By name, a student's own samples and what a process without vardistill makes by the lines that are printed."""
    root = tmp_path_factory.mktemp("pipelines")
    jobs, own = [], {}
    for i, name in enumerate(TEACHERS):
        t = from_diffusers(folder_of(name, root / "theirs" / name))
        for steps in NUMBERS:
            s, key = moved(t, steps, adapters=(i % 2 == 0) == (steps == 1)), f"{name}-{steps}"
            own[key] = s.sample(N, SEED, **condition(s.classes))
            jobs.append((key, export_diffusers(s, root / key)))
        save_pipeline(t, root / name)
        load, _ = usage_of(t, None, str(root / name)).rsplit("\n", 1)
        what = "latents" if t.latents else "pictures"
        jobs.append((name, f"{load}\n{what} = pipeline(batch_size={N}, num_inference_steps={STEPS}).images"))
    environment = os.environ | {"HF_HOME": str(root / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", ALONE.replace("SEED", str(SEED)), str(root / "made.npz")]
    subprocess.run(words, input=json.dumps(jobs), text=True, check=True, env=environment, timeout=300)
    return {key: (own.get(key), torch.from_numpy(made)) for key, made in np.load(root / "made.npz").items()}


@pytest.mark.slow
@every_teacher
@pytest.mark.parametrize("steps", NUMBERS)
def test_printed_lines_draw_the_students_pictures_without_vardistill(
    printed: dict[str, tuple[Tensor | None, Tensor]], name: str, steps: int
) -> None:
    own, made = printed[f"{name}-{steps}"]
    assert own is not None
    rounding = 1e-6 * steps * float(own.abs().max())
    if name.startswith("latents"):
        assert (own.abs() > 1).any()
    else:
        own = seen(own)
        assert ((own > 0) & (own < 1)).float().mean() > 0.2
        _, of_8_bits = printed[f"{name}-{steps}-pil"]
        torch.testing.assert_close(of_8_bits.reshape(N, *own.shape[2:], -1).movedim(3, 1), own, rtol=0, atol=0.003)
    torch.testing.assert_close(made, own, rtol=0, atol=rounding)


@pytest.mark.slow
@every_teacher
def test_a_teacher_samples_without_vardistill(printed: dict[str, tuple[Tensor | None, Tensor]], name: str) -> None:
    """DDIM at every 250th step down to σ = 0, and Euler's rule on EDM's grid, which is DDIM's where α = 1."""
    t, (_, made) = teacher(name), printed[name]
    assert made.shape == (N, *t.data_shape)
    assert made.isfinite().all()
    assert not name.startswith("latents") or (made.abs() > 1).any()
    if name not in ("epsilon", "labels", "edm"):
        return
    noise = torch.randn(N, *t.data_shape, generator=torch.Generator().manual_seed(SEED))
    times = torch.tensor([999, 749, 499, 249], dtype=torch.float64) / 999
    if name == "edm":
        times = karras_times(t.schedule, STEPS, t_min=0.0, t_max=1.0)
    else:
        noise = noise / t.schedule(times[:1])[1].float()  # pipelines start from variance 1, not σ²
    own = seen(sample(t, noise, STEPS, "ddim", times, **condition(t.classes)))
    torch.testing.assert_close(made, own, rtol=0, atol=1e-4)


@every_teacher
def test_the_teacher_comes_back(name: str, tmp_path: Path) -> None:
    t = teacher(name)
    save_pipeline(t, tmp_path / "teacher")
    back = from_diffusers(tmp_path / "teacher")
    x = torch.randn(N, *t.data_shape, generator=torch.Generator().manual_seed(SEED))
    levels = torch.linspace(0.1, 0.9, N)
    with torch.no_grad():
        expected, found = (denoiser(x, levels, **condition(t.classes)) for denoiser in (t, back))
    assert back.schedule == t.schedule
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["epsilon", "v", "sample", "labels", "edm", "edm-v", "dit"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_comes_back_as_a_denoiser_whose_last_level_is_its_first(
    name: str, steps: int, tmp_path: Path
) -> None:
    s = student(name, steps)
    save(s, tmp_path / "student")
    back = from_diffusers(tmp_path / "student")
    z = s.latents(N, torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        torch.testing.assert_close(
            back(s.input_scale(1) * z, torch.ones(N), **condition(s.classes)),
            s(z, **condition(s.classes)),
            rtol=1e-5,
            atol=1e-5,
        )


def test_the_folder_holds_no_pickles_and_code_only_where_it_is_needed(tmp_path: Path) -> None:
    for name, steps in (("epsilon", 1), ("edm", 1), ("epsilon", 2)):
        save(student(name, steps), tmp_path / f"{name}-{steps}")
    names = {
        path.name: {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} for path in tmp_path.iterdir()
    }
    stock = {
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert names == {
        "epsilon-1": stock,
        "edm-1": stock | {"pipeline.py"},
        "epsilon-2": stock | {"pipeline.py"},
    }
    assert 'DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)' in (
        tmp_path / "edm-1" / "README.md"
    ).read_text(encoding="utf-8")


def test_a_folder_in_use_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        save_pipeline(teacher("edm"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    save_pipeline(teacher("edm"), tmp_path)
    assert (tmp_path / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "full"), UsageError)]
)
def test_a_broken_save_leaves_nothing(
    error: BaseException, raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = teacher("edm")

    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(t.scheduler, "save_pretrained", fail)
    with pytest.raises(raised):
        save_pipeline(t, tmp_path / "teacher")
    assert list(tmp_path.iterdir()) == []


def test_a_time_between_two_steps_is_refused(tmp_path: Path) -> None:
    for times in ((500.5 / 999,), (500 / 999, 250.5 / 999)):
        with pytest.raises(UsageError, match="between two of the 1000 steps"):
            save_pipeline(teacher("epsilon"), tmp_path / "student", times)


def test_a_network_that_takes_more_than_labels_is_refused(tmp_path: Path) -> None:
    t = teacher("epsilon")
    t.network = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        cross_attention_dim=8,
    )
    with pytest.raises(UsageError, match="UNet2DConditionModel, which takes more than labels"):
        save_pipeline(t, tmp_path / "teacher")


def loaded(name: str) -> ImagePipeline:
    """The pipeline's class on its own."""
    network, scheduler = TEACHERS[name]()
    pipeline = ImagePipeline(scheduler, unet=network, classes=int(network.config.num_class_embeds or 0), steps=2)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", ["v", "edm-v", "flow"])
def test_a_students_number_of_steps_is_its_own(name: str, tmp_path: Path) -> None:
    save(student(name, 2), tmp_path / "student")
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    network, scheduler = TEACHERS[name]()
    pipeline = ImagePipeline(scheduler, unet=network, steps=index["steps"], student=index["student"])
    pipeline.set_progress_bar_config(disable=True)
    same, other = (
        pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=n, output_type="latent").images
        for n in (None, 2)
    )
    assert torch.equal(same, other)
    with pytest.raises(ValueError, match="makes a picture in 2 steps, not in 3"):
        pipeline(num_inference_steps=3)


def test_generators_of_single_pictures_of_a_student(tmp_path: Path) -> None:
    """A list of generators fixes each picture by its own, whatever the batch."""
    save(student("edm", 3), tmp_path / "student")
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    network, scheduler = TEACHERS["edm"]()
    pipeline = ImagePipeline(scheduler, unet=network, classes=4, steps=3, student=index["student"])
    pipeline.set_progress_bar_config(disable=True)
    options = {"class_labels": 1, "output_type": "latent"}
    together = pipeline(2, generator=[torch.Generator().manual_seed(i) for i in range(2)], **options).images
    alone = [pipeline(1, generator=torch.Generator().manual_seed(i), **options).images for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_labels_of_the_pipeline() -> None:
    pipeline, options = loaded("edm"), {"batch_size": N, "output_type": "latent", "return_dict": False}
    (one,), (same,), (turn,), (listed,) = (
        pipeline(generator=torch.Generator().manual_seed(0), class_labels=labels, **options)
        for labels in (2, torch.full((N,), 2), None, [i % 4 for i in range(N)])
    )
    assert torch.equal(one, same)
    assert torch.equal(turn, listed)
    assert not torch.equal(one[0], turn[0])
    with pytest.raises(ValueError, match=r"class_labels must be in \[0, 4\)"):
        pipeline(class_labels=4)
    with pytest.raises(ValueError, match="unconditional"):
        loaded("edm-v")(class_labels=0)


@pytest.mark.parametrize("channels", [2, 4])
def test_what_is_no_picture_is_given_as_it_is(channels: int) -> None:
    """Of a latent model."""
    pipeline = ImagePipeline(diffusers.EDMEulerScheduler(), unet=tiny_unet(channels=channels), steps=2)
    pipeline.set_progress_bar_config(disable=True)
    given, latent = (
        pipeline(batch_size=2, generator=torch.Generator().manual_seed(0), **options).images
        for options in ({}, {"output_type": "latent"})
    )
    assert torch.equal(given, latent)
    assert given.shape == (2, channels, 8, 8)
    with pytest.raises(ValueError, match=f"makes latents of {channels} channels, not pictures: use 'latent'"):
        pipeline(output_type="pil")


def test_kinds_of_pictures() -> None:
    latent, tensor, array, pil = (
        loaded("edm")(generator=torch.Generator().manual_seed(0), output_type=kind).images
        for kind in ("latent", "pt", "np", "pil")
    )
    assert torch.equal(tensor, seen(latent))
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(pil[0]), (array[0, ..., 0] * 255).round().astype(np.uint8))


def test_a_teachers_scheduler_needs_nothing_but_a_number_of_steps() -> None:
    """A shift that follows the resolution would ask its caller for `mu`."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    steps = sampler(DiffusersDenoiser(tiny_unet(None), scheduler), None)
    steps.set_timesteps(4)
    assert len(steps.timesteps) == 4
    assert scheduler.config.use_dynamic_shifting
