"""From a configuration to teacher, student, levels and objective; and what does not fit each other."""

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
from vardistill.denoisers import DiffusersDenoiser, Guided, Mixed
from vardistill.diffusion.noise import Draw
from vardistill.domains.pictures.build import (
    SIGMA_DATA,
    Setting,
    Teacher,
    build_conditions,
    build_guided,
    build_levels,
    build_objective,
    build_real_samples,
    build_setting,
    build_student,
    load_teacher,
)
from vardistill.domains.pictures.config import (
    ImageDiffInstructConfig,
    ImagesConfig,
    ImageSumConfig,
    ImageVarDiUConfig,
    ImageVarFlowConfig,
    OneStepConfig,
)
from vardistill.domains.pictures.data import ImageData, load_images
from vardistill.domains.pictures.features import ClassifierFeatures, Features, load_features
from vardistill.domains.pictures.presets import IMAGE_PRESETS
from vardistill.domains.pictures.spaces import ClassifierSpace, EncoderSpace
from vardistill.errors import UsageError
from vardistill.export.pipelines import save_pipeline
from vardistill.objectives import DiffInstruct, Objective, VarDiU, VarFlow, WeightedSum
from vardistill.posteriors.pictures import CouplingFlow
from vardistill.runs.config import Config
from vardistill.training import config_files

PARTS = {
    "images-vardiu": [VarDiU],
    "images-varflow": [VarFlow],
    "images-vardiu-varflow": [VarDiU, VarFlow],
    "images-diff-instruct": [DiffInstruct],
    "images-diff-instruct-varflow": [DiffInstruct, VarFlow],
}
VARFLOW = ImagesConfig(objective=ImageVarFlowConfig())


@pytest.fixture(scope="module")
def setting(teacher_run: Path) -> Setting:
    """Of VarDiU; a test that changes weights takes its own."""
    return build_setting(ImagesConfig(teacher=str(teacher_run)))


def of_parts(
    classes: int | None = None,
    data: ImageData | None = None,
    known: int = 0,
    config: ImagesConfig | None = None,
    **teacher: Any,
) -> Setting:
    """A setting of a tiny network of `classes` rows, whose student takes `known` labels."""
    denoiser = DiffusersDenoiser(tiny_unet(classes), diffusers.EDMEulerScheduler())
    return Setting(config or ImagesConfig(), Teacher(denoiser, **teacher), data, known, 0.5)


def objective_of(setting: Setting, features: Features | None = None) -> Objective:
    return build_objective(setting, build_guided(setting), features, build_student(setting))


def refused(match: str, call: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


# What a preset is built to


@pytest.mark.parametrize("name", IMAGE_PRESETS)
def test_every_preset_is_built_under_its_teachers_schedule(name: str, teacher_run: Path) -> None:
    config = replace(IMAGE_PRESETS[name].config, teacher=str(teacher_run))
    setting = build_setting(config)
    student, levels = build_student(setting), build_levels(setting)
    teacher = build_guided(setting)
    objective = objective_of(setting)
    assert [type(part) for part in objective.parts] == PARTS[name]
    assert config.training.precision == "bf16"
    for part in objective.parts:
        assert isinstance(part.teacher, Mixed)
        assert part.teacher.denoiser is setting.teacher.denoiser
    assert teacher is setting.teacher.denoiser  # its samples and evaluations have all digits
    for some in (levels, *objective.other_levels):
        assert some.schedule == setting.teacher.denoiser.schedule
    assert levels.stratified
    assert (student.classes, student.data_shape, student.data_std) == (10, (1, 8, 8), setting.std)
    assert setting.std == load_images("digits").std
    real = build_real_samples(setting, teacher, build_conditions(setting))
    assert (real is not None) == objective.needs_real == (VarFlow in PARTS[name])


@pytest.mark.parametrize("name", IMAGE_PRESETS)
def test_every_presets_loss_reaches_the_student(name: str, teacher_run: Path, rng: torch.Generator) -> None:
    setting = build_setting(replace(IMAGE_PRESETS[name].config, teacher=str(teacher_run)))
    conditions, student, levels = build_conditions(setting), build_student(setting), build_levels(setting)
    assert conditions is not None
    teacher = build_guided(setting)
    objective = objective_of(setting)
    with torch.no_grad():
        for p in objective.auxiliary_parameters():
            p.add_(0.01)  # a critic that is the teacher has nothing to say
    real = build_real_samples(setting, teacher, conditions)
    z, batch = student.latents(8, rng), dict(conditions(8, rng))
    noise, *others = (some.draw((1, 8, 8), 8, 0.5, rng, real=True) for some in (levels, *objective.other_levels))
    draw = Draw(z, student(z, **batch), noise, student, batch=batch, other_noise=tuple(others))
    draw = draw if real is None else replace(draw, real=real(8, rng, **batch))
    loss = objective.generator_loss(draw)
    assert loss.shape == (8,)
    loss.mean().backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_the_student_starts_as_its_teacher_or_fresh(setting: Setting) -> None:
    theirs = setting.teacher.denoiser.state_dict()
    ours = build_student(setting).denoiser.state_dict()
    assert all(torch.equal(v, ours[name]) for name, v in theirs.items())
    fresh = replace(setting, config=replace(setting.config, generator=OneStepConfig(start="fresh")))
    first, second = (build_student(fresh).denoiser.state_dict() for _ in range(2))
    assert all(torch.equal(v, second[name]) for name, v in first.items())
    assert not torch.equal(first["network.conv_in.weight"], theirs["network.conv_in.weight"])


def test_adapters_are_those_of_the_seed(setting: Setting) -> None:
    lora = replace(setting, config=replace(setting.config, generator=OneStepConfig(lora_rank=2)))
    first, second = build_student(lora), build_student(lora)
    trained = [p for p in first.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < sum(p.numel() for p in setting.teacher.denoiser.parameters()) / 2
    assert all(torch.equal(v, second.state_dict()[name]) for name, v in first.state_dict().items())


def test_the_ratio_places_the_student(setting: Setting) -> None:
    placed = replace(setting, config=replace(setting.config, generator=OneStepConfig(ratio=1.5)))
    assert build_student(placed).scale == pytest.approx(1.5, rel=1e-6)
    assert build_student(setting).scale == pytest.approx(5 * setting.std, rel=1e-6)


def test_a_critic_is_the_teachers_copy(setting: Setting) -> None:
    config = replace(setting.config, objective=ImageDiffInstructConfig(critic_steps=3))
    objective = objective_of(replace(setting, config=config))
    assert isinstance(objective, DiffInstruct)
    assert objective.critic_steps == 3
    theirs, own = (dict(net.named_parameters()) for net in (setting.teacher.denoiser, objective.critic))
    assert all(torch.equal(p, own[name]) and p is not own[name] for name, p in theirs.items())
    training = replace(config.training, precision="bf16")
    mixed = objective_of(replace(setting, config=replace(config, training=training)))
    assert isinstance(mixed, DiffInstruct)
    assert isinstance(mixed.critic, Mixed)


def test_a_posterior_is_that_of_the_seed_and_of_the_configuration(setting: Setting) -> None:
    o = ImageVarDiUConfig(posterior="coupling", rank=2, width=8, candidates=2, posterior_steps=3)
    chosen = replace(setting, config=ImagesConfig(objective=o))
    first, second = (objective_of(chosen) for _ in range(2))
    assert isinstance(first, VarDiU)
    assert isinstance(first.posterior, CouplingFlow)
    assert first.posterior.classes == 10
    assert (first.candidates, first.critic_steps) == (2, 2)
    assert all(torch.equal(v, second.state_dict()[name]) for name, v in first.state_dict().items())


def test_the_sums_parts_have_levels_of_their_own(setting: Setting) -> None:
    o = ImageSumConfig(first=ImageDiffInstructConfig(), varflow_shared=4, varflow_weight=2.0, varflow_weight_end=0.5)
    objective = objective_of(replace(setting, config=ImagesConfig(objective=o)))
    assert isinstance(objective, WeightedSum)
    first, varflow = objective.terms
    assert first.levels is None
    assert varflow.levels is not None
    assert varflow.levels.shared == 4
    assert [varflow.weight_at(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([16.0, 8.0, 4.0])


# Where distances are taken, and between what


def space_of(setting: Setting, space: Any, features: Any = None) -> Any:
    config = ImagesConfig(objective=ImageVarFlowConfig(space=space))
    objective = objective_of(replace(setting, config=config), features)
    assert isinstance(objective, VarFlow)
    return objective.features


def test_spaces(setting: Setting) -> None:
    assert space_of(setting, "pixels") is None
    assert setting.teacher.classifier is not None
    features = load_features(setting.teacher.classifier)
    assert isinstance(features, ClassifierFeatures)
    space = space_of(setting, "classifier", features)
    assert isinstance(space, ClassifierSpace)
    assert space.classifier is not features.classifier
    encoder = space_of(setting, "teacher")
    assert isinstance(encoder, EncoderSpace)
    assert encoder.denoiser is setting.teacher.denoiser
    assert encoder.label == 10  # no class


def test_the_classifiers_space_needs_one(setting: Setting) -> None:
    refused("the classifier's space needs a classifier", lambda: space_of(setting, "classifier"))


def test_real_pictures_are_those_of_the_data(setting: Setting, rng: torch.Generator) -> None:
    of_varflow = replace(setting, config=VARFLOW)
    real = build_real_samples(of_varflow, build_guided(setting), build_conditions(setting))
    assert real is not None
    data = load_images("digits").train
    assert data.labels is not None
    threes = data.take((data.labels == 3).nonzero().flatten())
    drawn = real(5, rng, labels=torch.full((5,), 3))
    assert all((threes == x).flatten(1).all(1).any() for x in drawn)


def test_real_pictures_may_be_the_teachers_own(setting: Setting, rng: torch.Generator) -> None:
    """Drawn once, from a seed, without data."""
    config = ImagesConfig(objective=ImageVarFlowConfig(real="teacher", real_samples=100, real_steps=2))
    free = replace(setting, config=config, data=None)
    first, second = (build_real_samples(free, build_guided(free), build_conditions(free)) for _ in range(2))
    assert first is not None
    assert second is not None
    labels, state = torch.arange(10), rng.get_state()
    drawn = first(10, rng, labels=labels)
    assert drawn.shape == (10, 1, 8, 8)
    assert torch.equal(drawn, second(10, rng.set_state(state), labels=labels))


def test_varflow_without_pictures_is_refused(setting: Setting) -> None:
    free = replace(setting, config=VARFLOW, data=None)
    refused("VarFlow learns from pictures: give --data", lambda: build_real_samples(free, build_guided(free), None))


# Conditions and guidance


def test_labels_are_as_frequent_as_in_the_data(tmp_path: Path) -> None:
    data = load_images(str(save_npz(tmp_path / "x.npz", 60, classes=3)))
    conditions = build_conditions(of_parts(3, data, 3))
    assert conditions is not None
    counts = torch.stack([(data.train.labels == c).sum() for c in range(3)])  # type: ignore[union-attr]
    torch.testing.assert_close(conditions.frequencies.float(), counts / counts.sum())  # type: ignore[attr-defined]


def test_labels_are_equally_frequent_without_data() -> None:
    conditions = build_conditions(of_parts(3, known=3))
    assert conditions is not None
    assert conditions.frequencies.tolist() == [1, 1, 1]  # type: ignore[attr-defined]
    assert build_conditions(of_parts()) is None


def test_a_teacher_of_ones_own_is_guided_by_its_label_for_no_class(setting: Setting) -> None:
    guided = build_guided(replace(setting, config=replace(setting.config, guidance=2.0)))
    assert isinstance(guided, Guided)
    assert (guided.scale, guided.null) == (2.0, {"labels": 10})
    assert build_guided(setting) is setting.teacher.denoiser


def test_a_dits_label_for_no_class_is_one_past_its_classes() -> None:
    denoiser = DiffusersDenoiser(tiny_dit(classes=3), diffusers.DDIMScheduler())
    setting = Setting(ImagesConfig(guidance=3.0), Teacher(denoiser), None, 3, 0.5)
    guided = build_guided(setting)
    assert isinstance(guided, Guided)
    assert guided.null == {"labels": 3}


@pytest.mark.parametrize(("rows", "known"), [(None, 0), (3, 3), (11, 3)])
def test_guidance_without_a_label_for_no_class_is_refused(rows: int | None, known: int) -> None:
    """Of eleven rows for three classes it is not known which is for none."""
    setting = of_parts(rows, known=known, config=ImagesConfig(guidance=2.0))
    refused("guidance needs a conditional teacher with a label for no class", lambda: build_guided(setting))


# Teachers and data


def test_a_run_brings_its_data_and_its_classifier(teacher_run: Path) -> None:
    teacher = load_teacher(str(teacher_run))
    assert teacher.data == "digits"
    assert teacher.classifier == teacher_run / "classifier"
    assert (teacher.denoiser.classes, teacher.denoiser.null_label) == (10, 10)


def test_a_pipeline_brings_neither(tmp_path: Path) -> None:
    folder = tiny_pipeline_folder(tmp_path / "pipeline", tiny_unet())
    setting = build_setting(ImagesConfig(teacher=str(folder)))
    assert (setting.teacher.data, setting.teacher.classifier, setting.data) == (None, None, None)
    assert (setting.classes, setting.std) == (0, SIGMA_DATA)
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.7)
    folder = tiny_pipeline_folder(tmp_path / "edm", tiny_unet(classes=3), scheduler)
    setting = build_setting(ImagesConfig(teacher=str(folder)))
    assert (setting.classes, setting.std) == (3, 0.7)


def test_labels_must_mean_what_the_teachers_do(teacher_run: Path, tmp_path: Path) -> None:
    """A teacher of a run names its classes; of a pipeline alone there are only as many."""
    rng = np.random.default_rng(0)
    for name in "abc0123456":
        (tmp_path / "letters" / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(256, size=(8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "letters" / name / f"{i}.png")
    config = ImagesConfig(teacher=str(teacher_run), data=str(tmp_path / "letters"))
    names = ("0", "1", "2", "3", "4", "5", "6", "a", "b", "c")
    assert load_images(config.data or "").class_names == names
    refused("label 7 is 'a' in letters, but '7' for the teacher", lambda: build_setting(config))
    assert build_setting(replace(config, teacher=str(teacher_run / "pipeline"))).classes == 10
    fewer = save_npz(tmp_path / "fewer.npz", classes=4)
    assert build_setting(replace(config, data=str(fewer))).classes == 4


def test_the_last_row_of_a_pipeline_that_names_its_classes_is_one_of_them(tmp_path: Path) -> None:
    """Of a foreign network it is for no class, where the data have one class less."""
    data = save_npz(tmp_path / "x.npz", classes=3)
    denoiser = DiffusersDenoiser(tiny_unet(4), diffusers.EDMEulerScheduler())
    save_pipeline(denoiser, tmp_path / "own", classes=4)
    foreign = tiny_pipeline_folder(tmp_path / "foreign", tiny_unet(4))
    for folder, null in ((tmp_path / "own", None), (foreign, 3)):
        setting = build_setting(ImagesConfig(teacher=str(folder), data=str(data)))
        assert setting.teacher.denoiser.null_label == null
        assert setting.classes == 3


def test_labels_of_the_data_are_left_out_for_an_unconditional_teacher(tmp_path: Path) -> None:
    folder, data = tiny_pipeline_folder(tmp_path / "x", tiny_unet()), save_npz(tmp_path / "x.npz", classes=3)
    setting = build_setting(ImagesConfig(teacher=str(folder), data=str(data)))
    assert setting.classes == 0
    assert setting.data is not None
    assert setting.std == setting.data.std


def test_teachers_that_are_none_are_refused(teacher_run: Path, tmp_path: Path) -> None:
    refused("no teacher: give --teacher FOLDER", lambda: build_setting(ImagesConfig()))
    refused("cannot read model_index.json of the pipeline", lambda: load_teacher(str(tmp_path / "nowhere")))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(teacher_run / "config.yaml", unfinished)
    refused(
        "has no finished teacher yet: go on with `vardistill teach --resume", partial(load_teacher, str(unfinished))
    )
    for config in (ImagesConfig(), Config()):
        config_files.write(config, unfinished / "config.yaml")
        refused("config.yaml", partial(load_teacher, str(unfinished)))


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
        return lambda: build_setting(ImagesConfig(teacher=str(teacher_run), data=str(data)))

    wide = save_npz(tmp_path / "wide.npz", size=16)
    refused(r"pictures of \(1, 16, 16\), but the teacher's are \(1, 8, 8\)", given(wide))
    refused(r"\(3, 8, 8\), but the teacher's", given(save_npz(tmp_path / "rgb.npz", channels=3)))
    refused("has 12 classes, but the teacher knows 10", given(save_npz(tmp_path / "many.npz", classes=12)))
