"""The student that starts as its teacher's first step: to the bit, saved and loaded, with and without adapters."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tiny_models import tiny_dit, tiny_pipeline_folder, tiny_unet
from vardistill.denoisers import Adapted, DiffusersDenoiser, from_diffusers
from vardistill.diffusion.schedules import Table
from vardistill.errors import UsageError
from vardistill.students import load_student
from vardistill.students.denoising import INITIAL_RATIO
from vardistill.students.network import NetworkStudent, describe

SCHEDULERS = {
    "edm": diffusers.EDMEulerScheduler(sigma_data=0.6),
    "epsilon": diffusers.DDPMScheduler(),
    "v": diffusers.DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "sample": diffusers.DDIMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2"),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
}
every_scheduler = pytest.mark.parametrize("kind", SCHEDULERS)
conditional_or_not = pytest.mark.parametrize("classes", [None, 3])


def teacher_of(kind: str = "edm", classes: int | None = 3, **options: Any) -> DiffusersDenoiser:
    return DiffusersDenoiser(tiny_unet(classes, **options), SCHEDULERS[kind])


def student_of(kind: str = "edm", classes: int | None = 3) -> NetworkStudent:
    return NetworkStudent.from_teacher(teacher_of(kind, classes))


def latents(n: int = 4, shape: tuple[int, ...] = (1, 8, 8)) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


def labels_of(student: NetworkStudent, n: int = 4) -> dict[str, Tensor]:
    return {"labels": torch.arange(n) % student.classes} if student.classes else {}


def output(student: NetworkStudent) -> Tensor:
    with torch.no_grad():
        return student(latents(shape=student.latent_shape), **labels_of(student))


@every_scheduler
@conditional_or_not
def test_a_new_student_is_the_first_step_of_its_teacher_to_the_bit(kind: str, classes: int | None) -> None:
    """x = D(c z, t): what a diffusers pipeline makes of its noise z in one step to σ = 0."""
    teacher = teacher_of(kind, classes, channels=2, size=4)
    student = NetworkStudent.from_teacher(teacher)
    assert student.classes == (classes or 0)
    assert student.data_shape == student.latent_shape == (2, 4, 4)
    z = latents(shape=(2, 4, 4))
    (t,) = student.times
    first = teacher(teacher.init_scale(t) * z, torch.full((4,), t), **labels_of(student))
    assert torch.equal(student(z, **labels_of(student)), first)
    assert student.input_scale(1) == teacher.init_scale(t)
    alpha, sigma = teacher.schedule(torch.tensor(t, dtype=torch.float64))
    assert student.initial_ratio == float(sigma / alpha)
    assert torch.equal(student.denoiser.schedule(torch.ones(1))[0], teacher.schedule(torch.ones(1))[0])


@every_scheduler
def test_the_students_weights_are_its_own(kind: str) -> None:
    teacher = teacher_of(kind)
    student = NetworkStudent.from_teacher(teacher)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    assert all(torch.equal(v, before[name]) for name, v in teacher.state_dict().items())


@every_scheduler
@pytest.mark.parametrize("ratio", [None, 0.3, 4.0])
def test_the_time_is_that_of_the_ratio(kind: str, ratio: float | None) -> None:
    """Exactly where time is continuous; of a table the step that is nearest."""
    teacher = teacher_of(kind)
    student = NetworkStudent.from_teacher(teacher, ratio, data_std=0.4)
    wanted = INITIAL_RATIO * 0.4 if ratio is None else ratio
    if not isinstance(teacher.schedule, Table):
        alpha, sigma = teacher.schedule(torch.tensor(student.times[0], dtype=torch.float64))
        assert float(sigma / alpha) == pytest.approx(wanted, rel=1e-6)
        return
    step = round(999 * student.times[0])
    assert student.times == (step / 999,)
    exact = 999 * float(teacher.schedule.time(torch.tensor(wanted, dtype=torch.float64)))
    assert abs(step - exact) <= 0.5


def test_a_ratio_below_the_table_is_its_second_step_and_one_above_its_last() -> None:
    """At step 0 there is next to no noise: the student would have nothing to draw from."""
    teacher = teacher_of("epsilon")
    assert NetworkStudent.from_teacher(teacher, ratio=1e-9).times == (1 / 999,)
    assert NetworkStudent.from_teacher(teacher, ratio=1e9).times == (1,)


@every_scheduler
@conditional_or_not
def test_a_student_comes_back_from_disk_to_the_bit(kind: str, classes: int | None, tmp_path: Path) -> None:
    student = student_of(kind, classes)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.01)
    student.save_pretrained(tmp_path)
    loaded = NetworkStudent.from_pretrained(tmp_path)
    assert torch.equal(output(loaded), output(student))
    assert (loaded.times, loaded.classes, loaded.data_std) == (student.times, student.classes, student.data_std)
    assert loaded.configuration() == student.configuration()
    assert not loaded.training


def path(student: NetworkStudent) -> Tensor:
    """All steps."""
    renoise = student.renoise(4, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return student(latents(shape=student.latent_shape), renoise, **labels_of(student))


@every_scheduler
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_a_path_renoises_what_the_network_predicts(kind: str, steps: int) -> None:
    """Written out by the teacher's own schedule."""
    teacher = teacher_of(kind)
    student = NetworkStudent.from_teacher(teacher, steps=steps)
    assert student.steps == len(set(student.times)) == steps
    noise = student.renoise(4, torch.Generator().manual_seed(1))
    x_t = teacher.init_scale(student.times[0]) * latents()
    with torch.no_grad():
        x = teacher(x_t, torch.full((4,), student.times[0]), **labels_of(student))
        for n, t in zip(noise, student.times[1:], strict=True):
            alpha, sigma = (float(v) for v in teacher.schedule(torch.tensor(t, dtype=torch.float64)))
            x = teacher(alpha * x + sigma * n, torch.full((4,), t), **labels_of(student))
    assert torch.equal(path(student), x)


@every_scheduler
@pytest.mark.parametrize("steps", [2, 4])
def test_several_levels_come_back_from_disk_with_adapters_merged(kind: str, steps: int, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = NetworkStudent.from_teacher(teacher_of(kind), steps=steps, rank=2)
    start = path(student)
    assert torch.equal(start, path(NetworkStudent.from_teacher(teacher_of(kind), steps=steps)))
    train_a_step(student)
    student.save_pretrained(tmp_path)
    loaded = NetworkStudent.from_pretrained(tmp_path)
    assert (loaded.times, loaded.steps) == (student.times, steps)
    assert torch.equal(path(loaded), path(student.merged()))
    torch.testing.assert_close(path(loaded), path(student), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(path(loaded), start, atol=1e-3)


def test_a_student_saved_when_there_was_one_time_loads(tmp_path: Path) -> None:
    student = student_of()
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config["t"],) = config.pop("times")
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = NetworkStudent.from_pretrained(tmp_path)
    assert loaded.times == student.times
    assert torch.equal(output(loaded), output(student))
    del config["t"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="times must be in .* but are none"):
        NetworkStudent.from_pretrained(tmp_path)


def test_a_student_of_a_dit(tmp_path: Path) -> None:
    """In training a DiT drops labels at random, and its student must not: x is a function of z and the label."""
    network = tiny_dit(classes=3, channels=2)
    nn.init.normal_(network.proj_out_2.weight, generator=torch.Generator().manual_seed(0))
    for p in network.transformer_blocks[0].attn1.parameters():
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    student = NetworkStudent.from_teacher(DiffusersDenoiser(network, diffusers.DDIMScheduler()))
    expected = output(student.eval())
    assert student.train().training
    assert all(torch.equal(output(student), expected) for _ in range(20))
    student.save_pretrained(tmp_path)
    assert torch.equal(output(NetworkStudent.from_pretrained(tmp_path)), output(student))


def test_the_configuration_says_nothing_of_where_the_teacher_came_from(tmp_path: Path) -> None:
    """diffusers notes paths and its version in what it loads."""
    folder = tiny_pipeline_folder(tmp_path / "secret-place", tiny_unet(classes=3), SCHEDULERS["epsilon"])
    teacher = from_diffusers(folder)
    assert "secret-place" in str(teacher.network.config)
    NetworkStudent.from_teacher(teacher).save_pretrained(tmp_path / "student")
    for name in ("config.json", "README.md"):
        text = (tmp_path / "student" / name).read_text()
        assert "secret-place" not in text
        assert str(tmp_path) not in text
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config.keys() == {"network", "scheduler", "times", "classes", "data_std", "latents"}
    notes = {name for part in ("network", "scheduler") for name in config[part] if name.startswith("_")}
    assert notes == {"_class_name"}


def test_a_schedule_given_as_an_array_comes_back(tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler(trained_betas=np.linspace(1e-4, 0.05, 200))
    student = NetworkStudent.from_teacher(DiffusersDenoiser(tiny_unet(), scheduler))
    student.save_pretrained(tmp_path)
    assert NetworkStudent.from_pretrained(tmp_path).denoiser.schedule == student.denoiser.schedule
    assert round(199 * student.times[0]) == 199 * student.times[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": [0.0]}, r"times must be in \(0, 1\].* but are 0"),
        ({"times": []}, r"times must be in \(0, 1\].* but are none"),
        ({"times": [0.5, 0.5]}, "times must decrease"),
        ({"classes": 4}, "the network takes 3 labels, but 4 classes were asked for"),
        ({"classes": 0}, "the network takes 3 labels, but 0 classes were asked for"),
        ({"classes": -1}, "the network takes 3 labels, but -1 classes were asked for"),
        ({"network": {"_class_name": "UNet2DModle"}}, "unknown class of diffusers 'UNet2DModle'.*UNet2DModel"),
        ({"network": {"_class_name": "DiffusionPipeline"}}, "unknown class of diffusers 'DiffusionPipeline'"),
        ({"network": {"_class_name": "DDIMScheduler"}}, "unknown class of diffusers 'DDIMScheduler'"),
        ({"network": {}}, "unknown class of diffusers 'None'"),
        ({"scheduler": {"_class_name": "os.system"}}, "unknown class of diffusers 'os.system'"),
    ],
)
def test_mistakes_and_foreign_classes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        NetworkStudent(**(student_of().configuration() | changes))
    assert "\n" not in str(caught.value)


def test_fewer_classes_than_the_network_has() -> None:
    student = NetworkStudent.from_teacher(teacher_of(classes=11), classes=10)
    assert student.classes == 10
    with pytest.raises(UsageError, match="labels must be in"):
        student.sample(2, labels=torch.tensor([0, 10]))


def test_a_configuration_describes_parts_anew() -> None:
    scheduler = SCHEDULERS["v"]
    again = type(scheduler).from_config(describe(scheduler))
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)


# Adapters


def adapted(kind: str = "edm", rank: int = 2, **options: Any) -> NetworkStudent:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NetworkStudent.from_teacher(teacher_of(kind, 3), rank=rank, **options)


def train_a_step(student: NetworkStudent) -> None:
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the first factor's gradient is 0 until the second has moved
        student(latents(), **labels_of(student)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@every_scheduler
def test_adapters_leave_the_output_as_it_is_to_the_bit(kind: str) -> None:
    assert torch.equal(output(adapted(kind)), output(student_of(kind)))


@every_scheduler
def test_merged_weights_are_the_sum(kind: str) -> None:
    student = adapted(kind)
    train_a_step(student)
    before = {name: v.clone() for name, v in student.denoiser.network.state_dict().items()}
    merged = student.merged()
    torch.testing.assert_close(output(merged), output(student), rtol=1e-5, atol=1e-5)
    assert merged.state_dict().keys() == student_of(kind).state_dict().keys()
    assert not isinstance(merged.denoiser, Adapted)
    assert isinstance(student.denoiser, Adapted)
    assert all(torch.equal(v, before[name]) for name, v in student.denoiser.network.state_dict().items())


def test_a_student_with_adapters_is_saved_merged(tmp_path: Path) -> None:
    student = adapted()
    train_a_step(student)
    student.save_pretrained(tmp_path)
    loaded = NetworkStudent.from_pretrained(tmp_path)
    assert torch.equal(output(loaded), output(student.merged()))
    assert loaded.state_dict().keys() == student_of().state_dict().keys()
    assert not any(type(module).__module__.startswith("peft") for module in loaded.modules())
    assert "lora" not in (tmp_path / "config.json").read_text()


# On disk


@pytest.mark.parametrize("damage", ["weights", "foreign", "missing", "config", "class", "nothing"])
def test_a_damaged_student_is_told_in_one_line(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "generator"
    student_of().save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "foreign":
        student_of(classes=None).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "model.safetensors", weights)
    elif damage == "missing":
        weights.unlink()
    elif damage == "config":
        config.write_text(config.read_text()[:100])
    elif damage == "class":
        config.write_text(config.read_text().replace("EDMEulerScheduler", "subprocess"))
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    with pytest.raises(UsageError) as caught:
        load_student(folder, NetworkStudent)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value) or damage == "class"
