"""What pictures provide: teacher, student, critic, posterior, spaces, real samples; and what does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from small_pictures import save_npz
from tiny_models import tiny_dit, tiny_pipeline_folder, tiny_unet
from vardistill.denoisers import Adapted, DiffusersDenoiser, Guided, Mixed
from vardistill.diffusion.config import LevelsConfig
from vardistill.diffusion.noise import Draw
from vardistill.domains.pictures import parts
from vardistill.domains.pictures.config import NetworkStudentConfig, PicturesConfig
from vardistill.domains.pictures.data import label_frequencies
from vardistill.domains.pictures.parts import SIGMA_DATA, Pictures, Teacher, load_teacher
from vardistill.domains.pictures.sources import load_images
from vardistill.domains.pictures.spaces import ClassifierSpace, EncoderSpace
from vardistill.errors import UsageError
from vardistill.export.pipelines import save_pipeline
from vardistill.objectives import DiffInstruct, Objective, VarDiU, VarFlow, WeightedSum
from vardistill.objectives.diff_instruct import DiffInstructConfig
from vardistill.objectives.registry import PartConfig, SumConfig
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.objectives.varflow import VarFlowConfig
from vardistill.posteriors.pictures import CouplingFlow
from vardistill.runs.config import Config
from vardistill.runs.presets import PRESETS
from vardistill.training import config_files
from vardistill.training.config import TrainingConfig

PARTS: dict[str, list[type[Objective]]] = {
    "images-vardiu": [VarDiU],
    "images-varflow": [VarFlow],
    "images-vardiu-varflow": [VarDiU, VarFlow],
    "images-diff-instruct": [DiffInstruct],
    "images-diff-instruct-varflow": [DiffInstruct, VarFlow],
}


def pictures(teacher: str | Path, training: TrainingConfig | None = None, **changes: Any) -> Pictures:
    """The parts of a run with this teacher, loaded without a folder."""
    training = TrainingConfig(device="cpu") if training is None else training
    found = Pictures(PicturesConfig(str(teacher), **changes), training)
    found.load(None)
    return found


@pytest.fixture(scope="module")
def domain(teacher_run: Path) -> Pictures:
    """Of the digits; a test that changes weights takes its own."""
    return pictures(teacher_run)


def of_denoiser(
    denoiser: DiffusersDenoiser, monkeypatch: pytest.MonkeyPatch, data: str | None = None, **changes: Any
) -> Pictures:
    """The parts of a run whose teacher is this network."""
    monkeypatch.setattr(parts, "load_teacher", lambda *source: Teacher(denoiser))
    return pictures("given", data=data, **changes)


def of_rows(classes: int | None, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Pictures:
    """Those of a tiny network with a table of `classes` rows."""
    denoiser = DiffusersDenoiser(tiny_unet(classes), diffusers.EDMEulerScheduler())
    return of_denoiser(denoiser, monkeypatch, **changes)


def objective_of(config: Any, domain: Pictures) -> Objective:
    built: Objective = config.build(domain)
    return built


def refused(match: str, call: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


# What a preset is built to


@pytest.mark.parametrize("name", PARTS)
def test_every_preset_is_built_under_its_teachers_schedule(name: str, teacher_run: Path) -> None:
    config = PRESETS[name].config
    assert config.training.precision == "auto"
    domain = pictures(teacher_run, replace(config.training, device="cpu", precision="bf16"))
    levels = config.levels.build(domain.schedule, domain.data_std)
    objective = objective_of(config.objective, domain)
    assert [type(part) for part in objective.parts] == PARTS[name]
    for part in objective.parts:
        assert isinstance(part.teacher, Mixed)
        assert part.teacher.denoiser is domain.source.denoiser
    assert domain.guided is domain.source.denoiser  # its samples and evaluations have all digits
    for some in (levels, *objective.updates()[-1].needs.other_levels):
        assert some.schedule == domain.source.denoiser.schedule
    assert levels.stratified
    student = domain.student
    assert (student.classes, student.data_shape, student.data_std) == (10, (1, 8, 8), domain.data_std)
    assert domain.data_std == load_images("digits").std


@pytest.mark.parametrize("name", PARTS)
def test_every_presets_loss_reaches_the_student(name: str, teacher_run: Path, rng: torch.Generator) -> None:
    config, domain = PRESETS[name].config, pictures(teacher_run)
    objective, student, conditions = objective_of(config.objective, domain), domain.student, domain.conditions
    assert conditions is not None
    with torch.no_grad():
        for network in objective.networks.values():
            for p in network.parameters():
                p.add_(0.01)  # a critic that is the teacher has nothing to say
    needs, levels = objective.updates()[-1].needs, config.levels.build(domain.schedule, domain.data_std)
    z, batch = student.latents(8, rng), dict(conditions(8, rng))
    noise, *others = (some.draw((1, 8, 8), 8, 0.5, rng, real=True) for some in (levels, *needs.other_levels))
    draw = Draw(z, student(z, **batch), noise, student, batch=batch, other_noise=tuple(others))
    if needs.real:
        draw = replace(draw, real=domain.real("data", 0, 0)(8, rng, **batch))
    loss = objective.generator_loss(draw)
    assert loss.shape == (8,)
    loss.mean().backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_the_student_starts_as_its_teacher_or_fresh(domain: Pictures, teacher_run: Path) -> None:
    theirs = domain.source.denoiser.state_dict()
    ours = domain.student.denoiser.state_dict()
    assert all(torch.equal(v, ours[name]) for name, v in theirs.items())
    fresh = NetworkStudentConfig(start="fresh")
    first, second = (pictures(teacher_run, student=fresh).student.denoiser.state_dict() for _ in range(2))
    assert all(torch.equal(v, second[name]) for name, v in first.items())
    assert not torch.equal(first["network.conv_in.weight"], theirs["network.conv_in.weight"])


def test_adapters_are_those_of_the_seed(domain: Pictures, teacher_run: Path) -> None:
    first, second = (pictures(teacher_run, student=NetworkStudentConfig(lora_rank=2)).student for _ in range(2))
    trained = [p for p in first.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < sum(p.numel() for p in domain.source.denoiser.parameters()) / 2
    assert all(torch.equal(v, second.state_dict()[name]) for name, v in first.state_dict().items())


def test_the_ratio_places_the_student(domain: Pictures, teacher_run: Path) -> None:
    def first_ratio(of: Pictures) -> float:
        alpha, sigma = of.schedule(torch.tensor(of.student.times[0], dtype=torch.float64))
        return float(sigma / alpha)

    placed = pictures(teacher_run, student=NetworkStudentConfig(ratio=1.5))
    assert first_ratio(placed) == pytest.approx(1.5, rel=1e-6)
    assert first_ratio(domain) == pytest.approx(5 * domain.data_std, rel=1e-6)


def test_a_student_of_several_steps_has_as_many_levels(teacher_run: Path) -> None:
    domain = pictures(teacher_run, student=NetworkStudentConfig(steps_per_sample=3))
    assert domain.student.steps == len(domain.student.times) == 3
    posteriors = objective_of(VarDiUConfig(posterior="diagonal", posterior_width=8), domain).networks["posterior"]
    assert len(posteriors) == 3  # type: ignore[arg-type]


def test_a_critic_is_the_teachers_copy(domain: Pictures, teacher_run: Path) -> None:
    config = DiffInstructConfig(critic_steps=3, critic_start="teacher")
    objective = objective_of(config, domain)
    critic = objective.networks["critic"]
    assert objective.updates()[0].repeats == 3
    theirs, own = (dict(net.named_parameters()) for net in (domain.source.denoiser, critic))
    assert all(torch.equal(p, own[name]) and p is not own[name] for name, p in theirs.items())
    mixed = objective_of(config, pictures(teacher_run, TrainingConfig(device="cpu", precision="bf16")))
    assert isinstance(mixed.networks["critic"], Mixed)


def test_a_critic_of_adapters_is_on_the_teachers_weights(domain: Pictures) -> None:
    config = DiffInstructConfig(critic_start="teacher", critic_rank=2)
    first, second = (objective_of(config, domain).networks["critic"] for _ in range(2))
    assert isinstance(first, Adapted)
    shared = first.network.state_dict()["conv_in.base_layer.weight"].data_ptr()
    assert shared == domain.source.denoiser.network.state_dict()["conv_in.weight"].data_ptr()
    assert all(torch.equal(v, second.state_dict()[name]) for name, v in first.state_dict().items())
    assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in domain.source.denoiser.parameters()) / 2


def test_a_fresh_critic_has_weights_of_its_own(domain: Pictures) -> None:
    first, second = (objective_of(DiffInstructConfig(), domain).networks["critic"].state_dict() for _ in range(2))
    theirs = domain.source.denoiser.state_dict()
    assert first.keys() == theirs.keys()
    assert all(torch.equal(v, second[name]) for name, v in first.items())
    assert not torch.equal(first["network.conv_in.weight"], theirs["network.conv_in.weight"])


def test_a_posterior_is_that_of_the_seed_and_of_the_configuration(domain: Pictures) -> None:
    config = VarDiUConfig(posterior="coupling", posterior_width=8, candidates=2, posterior_steps=3)
    first, second = (objective_of(config, domain) for _ in range(2))
    assert isinstance(first, VarDiU)
    posterior = first.networks["posterior"]
    assert isinstance(posterior, CouplingFlow)
    assert posterior.classes == 10
    assert (first.candidates, first.updates()[0].repeats) == (2, 2)
    again = second.networks["posterior"].state_dict()
    assert all(torch.equal(v, again[name]) for name, v in posterior.state_dict().items())


@pytest.mark.parametrize(("family", "rank"), [("diagonal", 0), ("low-rank", 2)])
def test_a_gaussian_posterior_has_its_rank(family: Any, rank: int, domain: Pictures) -> None:
    config = VarDiUConfig(posterior=family, posterior_width=8, posterior_rank=2)
    half, labels = torch.full((2,), 0.5), torch.tensor([0, 1])
    q = objective_of(config, domain).networks["posterior"](torch.zeros(2, 1, 8, 8), half, half, labels=labels)
    assert q.factor.shape == (2, rank, 64)


def test_posteriors_are_those_of_the_domain(domain: Pictures) -> None:
    told = "unknown posterior of pictures 'nsf': known: coupling, diagonal, low-rank, prior"
    refused(told, lambda: objective_of(VarDiUConfig(posterior="nsf"), domain))


def test_the_sums_parts_have_levels_of_their_own(domain: Pictures) -> None:
    """A weight means the same as for points: losses are means over the pixels."""
    own = PartConfig(VarFlowConfig(real="data"), 2.0, 0.5, LevelsConfig(weight="one", shared=4))
    objective = objective_of(SumConfig((PartConfig(DiffInstructConfig()), own)), domain)
    assert isinstance(objective, WeightedSum)
    first, varflow = objective.summands
    assert first.levels is None
    assert varflow.levels is not None
    assert varflow.levels.shared == 4
    assert [varflow.weight_at(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([2.0, 1.0, 0.5])


# Where distances are taken, and between what


def space_of(domain: Pictures, space: Any) -> Any:
    objective = objective_of(VarFlowConfig(space=space), domain)
    assert isinstance(objective, VarFlow)
    return objective.features


def test_spaces(domain: Pictures) -> None:
    assert space_of(domain, "data") is None
    space = space_of(domain, "classifier")
    assert isinstance(space, ClassifierSpace)
    assert space.classifier is not domain.features.classifier  # type: ignore[union-attr]
    encoder = space_of(domain, "teacher")
    assert isinstance(encoder, EncoderSpace)
    assert encoder.denoiser is domain.source.denoiser
    assert encoder.label == 10  # no class


def test_the_classifiers_space_needs_one(teacher_run: Path) -> None:
    free = pictures(teacher_run / "pipeline")
    refused("the classifier's space needs a classifier", lambda: space_of(free, "classifier"))


def test_real_pictures_are_those_of_the_data(domain: Pictures, rng: torch.Generator) -> None:
    data = load_images("digits").train
    assert data.labels is not None
    threes = data.take((data.labels == 3).nonzero().flatten())
    drawn = domain.real("data", 0, 0)(5, rng, labels=torch.full((5,), 3))
    assert all((threes == x).flatten(1).all(1).any() for x in drawn)


def test_real_pictures_may_be_the_teachers_own(teacher_run: Path, rng: torch.Generator) -> None:
    """Drawn once, from a seed, without data."""
    free = pictures(teacher_run / "pipeline")
    assert free.data is None
    first, second = (free.real("teacher", 200, 2) for _ in range(2))
    labels, state = torch.arange(10), rng.get_state()
    drawn = first(10, rng, labels=labels)
    assert drawn.shape == (10, 1, 8, 8)
    assert torch.equal(drawn, second(10, rng.set_state(state), labels=labels))


def test_varflow_without_pictures_is_refused(teacher_run: Path) -> None:
    free = pictures(teacher_run / "pipeline")
    refused("real samples are pictures: give --data, or --real teacher", lambda: free.real("data", 0, 0))


# Conditions and guidance


def test_labels_are_as_frequent_as_in_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = of_rows(3, monkeypatch, data=str(save_npz(tmp_path / "x.npz", 60, classes=3)))
    conditions, data = domain.conditions, domain.data
    assert conditions is not None
    assert data is not None
    counts = torch.stack([(data.train.labels == c).sum() for c in range(3)])  # type: ignore[union-attr]
    torch.testing.assert_close(conditions.frequencies.float(), counts / counts.sum())  # type: ignore[attr-defined]


def test_labels_are_equally_frequent_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = of_rows(3, monkeypatch).conditions
    assert conditions is not None
    assert conditions.frequencies.tolist() == [1, 1, 1]  # type: ignore[attr-defined]
    assert of_rows(None, monkeypatch).conditions is None


def test_a_teacher_of_ones_own_is_guided_by_its_label_for_no_class(domain: Pictures, teacher_run: Path) -> None:
    guided = pictures(teacher_run, guidance=2.0).guided
    assert isinstance(guided, Guided)
    assert (guided.scale, guided.null) == (2.0, {"labels": 10})
    assert domain.guided is domain.source.denoiser


def test_a_dits_label_for_no_class_is_one_past_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = DiffusersDenoiser(tiny_dit(classes=3), diffusers.DDIMScheduler())
    guided = of_denoiser(denoiser, monkeypatch, guidance=3.0).guided
    assert isinstance(guided, Guided)
    assert guided.null == {"labels": 3}


@pytest.mark.parametrize("rows", [None, 3, 11])
def test_guidance_without_a_label_for_no_class_is_refused(
    rows: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eleven rows for three classes it is not known which is for none."""
    data = str(save_npz(tmp_path / "x.npz", classes=3)) if rows == 11 else None
    told = "guidance needs a conditional teacher with a label for no class"
    refused(told, lambda: of_rows(rows, monkeypatch, data=data, guidance=2.0))


# Teachers and data


def test_a_run_brings_its_data_and_its_classifier(teacher_run: Path) -> None:
    teacher = load_teacher(str(teacher_run))
    assert teacher.fit is not None
    assert teacher.fit.data == "digits"
    assert teacher.classifier == teacher_run / "classifier"
    assert (teacher.denoiser.classes, teacher.denoiser.null_label) == (10, 10)


def test_a_pipeline_brings_neither(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder(tmp_path / "pipeline", tiny_unet())
    domain = pictures(folder)
    assert (domain.source.fit, domain.source.classifier, domain.data) == (None, None, None)
    assert (domain.classes, domain.data_std) == (0, SIGMA_DATA)
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.7)
    folder = tiny_pipeline_folder(tmp_path / "edm", tiny_unet(classes=3), scheduler)
    domain = pictures(folder)
    assert (domain.classes, domain.data_std) == (3, 0.7)


def test_a_pipelines_weights_may_be_of_a_variant(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder(tmp_path / "x")
    tiny_unet(seed=1).save_pretrained(folder / "unet", variant="ema")
    plain, ema = (pictures(folder, variant=name).source.denoiser.network.conv_in.weight for name in (None, "ema"))
    assert torch.equal(ema, tiny_unet(seed=1).conv_in.weight)
    assert torch.equal(plain, tiny_unet().conv_in.weight)


def test_labels_must_mean_what_the_teachers_do(teacher_run: Path, tmp_path: Path) -> None:
    """A teacher of a run names its classes; of a pipeline alone there are only as many."""
    rng = np.random.default_rng(0)
    for name in "abc0123456":
        (tmp_path / "letters" / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(256, size=(8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "letters" / name / f"{i}.png")
    letters = str(tmp_path / "letters")
    names = ("0", "1", "2", "3", "4", "5", "6", "a", "b", "c")
    assert load_images(letters).class_names == names
    told = "letters has the class 'a', but the teacher's are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    refused(told, lambda: pictures(teacher_run, data=letters))
    assert pictures(teacher_run / "pipeline", data=letters).classes == 10
    fewer = save_npz(tmp_path / "fewer.npz", classes=4)
    assert pictures(teacher_run, data=str(fewer)).classes == 4


def test_classes_have_the_teachers_numbers(teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, or of a teacher that tells no names the number that is their name, whichever classes the data lack."""
    data_of, images = str(tmp_path / "x.npz"), np.random.default_rng(0).integers(256, size=(40, 8, 8), dtype=np.uint8)
    np.savez(data_of, images=images, labels=[2, 5, 5, 2] * 10)
    for domain in (pictures(teacher_run, data=data_of), of_rows(7, monkeypatch, data=data_of)):
        data = domain.data
        assert data is not None
        assert data.class_names == ("0", "1", "2", "3", "4", "5")
        assert data.train.labels is not None
        assert set(data.train.labels.tolist()) == {2, 5}
        assert label_frequencies(data.train)[[0, 1, 3, 4]].tolist() == [0, 0, 0, 0]
    assert of_rows(3, monkeypatch, data=data_of).data.class_names == ("2", "5")  # type: ignore[union-attr]


def test_data_of_several_sizes_get_the_teachers(teacher_run: Path, tmp_path: Path) -> None:
    for i, side in enumerate((8, 10, 12, 9)):
        Image.fromarray(np.full((side, side + 1), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    data = pictures(teacher_run, data=str(tmp_path)).data
    assert data is not None
    assert data.shape == (1, 8, 8)
    assert data.train.remarks == ("resized to 8×8 from 9×8 to 13×12",)
    for change in ({"size": 8}, {"mirrored": True}):
        refused("data must be given with size or mirrored, but is None", partial(pictures, teacher_run, **change))


def test_the_last_row_of_a_pipeline_that_names_its_classes_is_one_of_them(tmp_path: Path) -> None:
    """Of a foreign network it is for no class, where the data have one class less."""
    data = save_npz(tmp_path / "x.npz", classes=3)
    denoiser = DiffusersDenoiser(tiny_unet(4), diffusers.EDMEulerScheduler())
    save_pipeline(denoiser, tmp_path / "own", classes=4)
    foreign = tiny_pipeline_folder(tmp_path / "foreign", tiny_unet(4))
    for folder, null in ((tmp_path / "own", None), (foreign, 3)):
        domain = pictures(folder, data=str(data))
        assert domain.source.denoiser.null_label == null
        assert domain.classes == 3


def test_labels_of_the_data_are_left_out_for_an_unconditional_teacher(tmp_path: Path) -> None:
    folder, data = tiny_pipeline_folder(tmp_path / "x", tiny_unet()), save_npz(tmp_path / "x.npz", classes=3)
    domain = pictures(folder, data=str(data))
    assert domain.classes == 0
    assert domain.data is not None
    assert domain.data_std == domain.data.std


def test_teachers_that_are_none_are_refused(teacher_run: Path, tmp_path: Path) -> None:
    refused("no teacher: give --teacher FOLDER", lambda: pictures(""))
    refused("there is no folder .*nowhere", lambda: load_teacher(str(tmp_path / "nowhere")))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(teacher_run / "config.yaml", unfinished)
    refused(
        "has no finished teacher yet: go on with `vardistill teach --resume", partial(load_teacher, str(unfinished))
    )
    config_files.write(Config(), unfinished / "config.yaml")
    refused("config.yaml is the configuration of a run, but wanted here is", partial(load_teacher, str(unfinished)))


def test_a_network_that_takes_a_text_is_refused(tmp_path: Path) -> None:
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    network.save_pretrained(tmp_path / "unet")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    index = '{"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]}'
    (tmp_path / "model_index.json").write_text(index)
    refused("UNet2DConditionModel, which takes more than labels", lambda: load_teacher(str(tmp_path)))


def test_data_of_another_shape_or_of_more_classes_are_refused(teacher_run: Path, tmp_path: Path) -> None:
    def given(data: Path) -> Callable[[], object]:
        return lambda: pictures(teacher_run, data=str(data))

    wide = save_npz(tmp_path / "wide.npz", size=16)
    refused(r"pictures of \(1, 16, 16\), but the teacher's are \(1, 8, 8\): --size 8 resizes them", given(wide))
    assert pictures(teacher_run, data=str(wide), size=8).data.shape == (1, 8, 8)  # type: ignore[union-attr]
    refused(r"\(3, 8, 8\), but the teacher's", given(save_npz(tmp_path / "rgb.npz", channels=3)))
    refused("has 12 classes, but the teacher knows 10", given(save_npz(tmp_path / "many.npz", classes=12)))
