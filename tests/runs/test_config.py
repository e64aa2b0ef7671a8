"""Configurations: complete on disk, and clear about what they do not take."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vardistill.diffusion.config import LevelsConfig
from vardistill.diffusion.levels import EDM, LogNormal, PowerLaw, UniformTime
from vardistill.domains.pictures.config import NetworkStudentConfig, PicturesConfig, PicturesTeachConfig, UNetConfig
from vardistill.domains.points.config import PerceptronConfig, PointsConfig, PointsTeachConfig, TeacherConfig
from vardistill.errors import UsageError
from vardistill.objectives.diff_instruct import DiffInstructConfig
from vardistill.objectives.registry import PartConfig, SumConfig
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.objectives.varflow import VarFlowConfig
from vardistill.runs.config import Config
from vardistill.runs.presets import PRESETS, TEACHERS
from vardistill.training.config import NetworkConfig, TrainingConfig
from vardistill.training.config_files import from_dict, read, to_dict, write

ALL: dict[str, Any] = {**PRESETS, **{f"teacher {name}": preset for name, preset in TEACHERS.items()}}


def refusal(match: str, text: str, tmp_path: Path, cls: Any = Config) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=match) as caught:
        read(cls, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_presets_survive_the_disk(name: str, tmp_path: Path) -> None:
    config = ALL[name].config
    assert from_dict(type(config), to_dict(config)) == config
    write(config, tmp_path / "config.yaml")
    assert read(type(config), tmp_path / "config.yaml") == config


@pytest.mark.parametrize("distribution", [LogNormal(), PowerLaw(sigma_max=7.0), EDM(std=1.0), UniformTime()])
def test_distributions_carry_their_kind(distribution: Any, tmp_path: Path) -> None:
    config = from_dict(Config, {"levels": {"distribution": {"kind": type(distribution).__name__}}})
    assert type(config.levels.distribution) is type(distribution)
    teach = PointsTeachConfig(distribution=distribution)
    write(teach, tmp_path / "config.yaml")
    assert read(PointsTeachConfig, tmp_path / "config.yaml") == teach


OBJECTIVES = [
    VarDiUConfig(posterior="full", candidates=3, posterior_steps=2),
    VarFlowConfig(beta=0.5, cross="paired", real="data"),
    DiffInstructConfig(critic_steps=5, critic_start="teacher"),
    SumConfig(
        (
            PartConfig(VarDiUConfig(candidates="batch", pool=64)),
            PartConfig(VarFlowConfig(beta=1.5), 2.0, 0.1, LevelsConfig(PowerLaw(), shared=4)),
        )
    ),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_carry_their_kind_in_every_domain(objective: Any, tmp_path: Path) -> None:
    domains = PointsConfig(student=PerceptronConfig(linear=True)), PicturesConfig(data="digits")
    for domain in domains:
        config = Config(domain, objective, LevelsConfig(shared=8))
        assert to_dict(config)["objective"]["kind"] == objective.name
        assert to_dict(config)["domain"]["kind"] == domain.name
        write(config, tmp_path / "config.yaml")
        assert read(Config, tmp_path / "config.yaml") == config


def test_a_sum_in_a_file_is_a_list_of_terms(tmp_path: Path) -> None:
    text = (
        "objective: {kind: sum, parts: [{objective: {kind: diff-instruct}}, {objective: {kind: varflow}, weight: 6}]}"
    )
    (tmp_path / "config.yaml").write_text(text)
    parts = PartConfig(DiffInstructConfig()), PartConfig(VarFlowConfig(), 6.0)
    assert read(Config, tmp_path / "config.yaml") == Config(objective=SumConfig(parts))


def test_the_first_kind_is_what_is_left_out() -> None:
    """Files that name no kind are of points, of VarDiU and of log-normal levels."""
    data = {"objective": {"candidates": "batch"}, "levels": {"distribution": {"base_start": 3.0}}}
    config = from_dict(Config, data)
    assert config.objective == VarDiUConfig(candidates="batch")
    assert config.levels.distribution == LogNormal(base_start=3.0)
    assert config.domain == PointsConfig()


def test_every_kind_of_value_survives_the_disk(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "training": {"max_minutes": 1.5, "clip": math.inf, "lr": 1e-5, "seed": -1, "compile": True}
        | {"networks": [{"name": "critic", "lr": 1e-4}, {"name": "student", "beta1": 0}]},
        "domain": {"teacher": {"teacher": "learned", "teacher_run": "somewhere/täg"}},
        "objective": {"candidates": "batch"},
    }
    config = from_dict(Config, values)
    assert config.domain.teacher.teacher_run == Path("somewhere/täg")
    assert config.training.networks == (NetworkConfig("critic", lr=1e-4), NetworkConfig("student", beta1=0.0))
    write(config, tmp_path / "config.yaml")
    assert read(Config, tmp_path / "config.yaml") == config


KINDS = {"": Config(), "PicturesTeach": PicturesTeachConfig(), "PointsTeach": PointsTeachConfig()}


class TestKinds:
    """A file's first line names its configuration's type, but for a run's."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_file_is_of_the_type_that_it_names(self, kind: str, tmp_path: Path) -> None:
        path, types = tmp_path / "config.yaml", tuple(map(type, KINDS.values()))
        write(KINDS[kind], path)
        first = path.read_text().splitlines()[0]
        assert first == f"kind: {kind}" if kind else not first.startswith("kind")
        for options in (type(KINDS[kind]), types, types[::-1]):
            assert read(options, path) == KINDS[kind]

    @pytest.mark.parametrize(
        ("types", "kind", "match"),
        [
            (Config, "PointsTeach", "a teacher of points, but wanted here is that of a run$"),
            (PointsTeachConfig, "PicturesTeach", "a teacher of pictures, .* that of a teacher of points$"),
            (PicturesTeachConfig, "''", "a run, but wanted here is that of a teacher of pictures$"),
            (
                (PointsTeachConfig, PicturesTeachConfig),
                "''",
                "a run, .* of a teacher of points or a teacher of pictures$",
            ),
            (Config, "[Images]", "an unknown kind, .*, but wanted here is"),
            (Config, "{a: 1}", "an unknown kind, .*, but wanted here is"),
        ],
    )
    def test_another_kind_is_refused(self, types: Any, kind: str, match: str, tmp_path: Path) -> None:
        refusal(f"config.yaml is the configuration of {match}", f"kind: {kind}", tmp_path, types)

    @pytest.mark.parametrize("types", [PicturesTeachConfig, PointsTeachConfig])
    def test_a_run_is_called_one(self, types: Any, tmp_path: Path) -> None:
        refusal("is the configuration of a run, but wanted here is", "domain: {}", tmp_path, types)

    def test_keys_are_those_of_the_kind(self, tmp_path: Path) -> None:
        refusal("unknown key in config.yaml 'domain'", "kind: PointsTeach\ndomain: {}", tmp_path, PointsTeachConfig)
        refusal(
            "unknown key in config.yaml.domain 'problem'", "domain: {kind: pictures, problem: mog40}", tmp_path, Config
        )
        refusal(
            "unknown kind of config.yaml.domain 'picture': did you mean pictures", "domain: {kind: picture}", tmp_path
        )

    @pytest.mark.parametrize(
        ("text", "of"),
        [
            ("problem: mog40\ngenerator: {depth: 4}\ntraining: {steps: 5}", "a run on points"),
            ("kind: Images\nteacher: somewhere\ngenerator: {lora_rank: 4}", "a run on pictures"),
            ("kind: Teach\nproblem: mog40", "a teacher of points"),
            ("kind: ImagesTeach\ndata: digits", "a teacher of pictures"),
        ],
    )
    @pytest.mark.parametrize("types", [Config, (PointsTeachConfig, PicturesTeachConfig)])
    def test_files_of_earlier_versions_are_refused_with_the_way_out(
        self, types: Any, text: str, of: str, tmp_path: Path
    ) -> None:
        match = f"config.yaml is the configuration of {of} of an earlier version: write it anew, .*vardistill list"
        refusal(match, text, tmp_path, types)


class TestTuples:
    def test_they_survive_the_disk(self, tmp_path: Path) -> None:
        config = PicturesTeachConfig(network=UNetConfig(channels=(8, 16, 24)))
        assert from_dict(PicturesTeachConfig, to_dict(config)) == config
        write(config, tmp_path / "config.yaml")
        assert "python" not in (tmp_path / "config.yaml").read_text()
        assert read(PicturesTeachConfig, tmp_path / "config.yaml") == config

    @pytest.mark.parametrize("channels", ["8", "[8, a]", "[8, 16.5]", "[8, true]", "{8: 16}", "null"])
    def test_other_values_are_refused(self, channels: str, tmp_path: Path) -> None:
        match = "config.yaml.network.channels must be a list of int, but is "
        refusal(match, f"kind: PicturesTeach\nnetwork: {{channels: {channels}}}", tmp_path, PicturesTeachConfig)


def test_runs_on_pictures_survive_the_disk(tmp_path: Path) -> None:
    domain = PicturesConfig(
        teacher="somewhere/täg",
        data="hf:日本",
        student=NetworkStudentConfig(lora_rank=4, ratio=3.0, steps_per_sample=4),
    )
    config = Config(domain, DiffInstructConfig())
    assert from_dict(Config, to_dict(config)) == config
    write(config, tmp_path / "config.yaml")
    assert read(Config, tmp_path / "config.yaml") == config
    assert "teacher: somewhere/täg\n  variant: null\n  data: hf:日本\n" in (tmp_path / "config.yaml").read_text("utf-8")


@pytest.mark.parametrize("guidance", [-1.0, math.inf, math.nan])
def test_guidance_has_a_range(guidance: float) -> None:
    assert PicturesConfig(guidance=0.0).guidance == 0
    with pytest.raises(UsageError, match=f"guidance must be 0 or positive, and finite, but is {guidance}"):
        PicturesConfig(guidance=guidance)


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("training: {steps: 5}")
    assert read(Config, tmp_path / "config.yaml") == Config(training=TrainingConfig(steps=5))


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1", 1.0), (".inf", math.inf), ("2.5E-4", 2.5e-4)])
def test_numbers_may_be_written_as_people_do(text: str, value: float, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"training: {{clip: {text}}}")
    assert read(Config, tmp_path / "config.yaml").training.clip == value


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("training: {stesp: 5}", "unknown key in config.yaml.training 'stesp': did you mean steps?"),
        ("trainin: {}", "unknown key in config.yaml 'trainin': did you mean training?"),
        ("7: {}", "unknown key in config.yaml '7': known: "),
        ("training: {steps: many}", "config.yaml.training.steps must be int, but is 'many'"),
        ("training: {steps: 2.5}", "config.yaml.training.steps must be int, but is 2.5"),
        ("training: {steps: true}", "config.yaml.training.steps must be int, but is True"),
        ("training: {steps: null}", "config.yaml.training.steps must be int, but is None"),
        ("training: {lr: fast}", "config.yaml.training.lr must be float, but is 'fast'"),
        ("training: {lr: true}", "config.yaml.training.lr must be float, but is True"),
        ("training: {compile: 1}", "config.yaml.training.compile must be bool, but is 1"),
        ("training: {precision: fp8}", "config.yaml.training.precision must be .*bf16.*, but is 'fp8'"),
        ("training: {tracker: [a]}", "config.yaml.training.tracker must be .*tensorboard.*, but is"),
        ("training: {max_minutes: soon}", "config.yaml.training.max_minutes must be float or None"),
        ("training: 5", "config.yaml.training must be a mapping, but is 5"),
        ("objective: {candidates: some}", "config.yaml.objective.candidates must be int or .*batch"),
        ("levels: {distribution: {kind: LogNorml}}", "unknown kind .*'LogNorml': did you mean LogNormal?"),
        ("objective: {kind: varflw}", "unknown kind of config.yaml.objective 'varflw': did you mean varflow?"),
        ("objective: {kind: varflow, candidates: 3}", "unknown key in config.yaml.objective 'candidates'"),
        (
            "objective: {kind: sum, parts: [{}, {objective: {kind: varflow, posterior: full}}]}",
            r"unknown key in config.yaml.objective.parts\[1\].objective 'posterior'",
        ),
        (
            "objective: {kind: sum, parts: [{wieght: 2}]}",
            r"unknown key in config.yaml.objective.parts\[0\] 'wieght': did",
        ),
        ("objective: {kind: sum, parts: 5}", "config.yaml.objective.parts must be a list, but is 5"),
        ("objective: {kind: sum}", r"a sum's parts must be at least one, of different kinds, but is \[\]"),
        ("objective: {kind: sum, parts: [{}, {}]}", "a sum's parts must be at least one, of different kinds"),
        ("training: {networks: [{lr: 1}]}", r"config.yaml.training.networks\[0\] needs a name"),
        ("training: {networks: [{name: critic, lr: x}]}", r"networks\[0\].lr must be float or None"),
        ("training: {networks: [critic]}", r"networks\[0\] must be a mapping, but is 'critic'"),
        ("training: {networks: [{name: critic}, {name: critic}]}", "networks must be of different names"),
        ("objective: {kind: varflow, real: dta}", "config.yaml.objective.real must be .*'data'.*, but is 'dta'"),
        ("objective: batch", "config.yaml.objective must be a mapping, but is 'batch'"),
        ("levels: {distribution: {kind: EDM, rho: 1}}", "unknown key in config.yaml.levels.distribution 'rho'"),
        ("levels: {distribution: 5}", "config.yaml.levels.distribution must be a mapping, but is 5"),
        ("[]", "config.yaml must be a mapping"),
        ("", "config.yaml must be a mapping"),
        (f"training: {{lr: {'1' * 400}}}", "config.yaml.training.lr must be float, but is 111"),
        ("training: {steps: 5", r"cannot read the configuration .*config.yaml, line 1: expected ',' or '}'"),
        ("training:\n  steps: 5\n lr: 3", "cannot read the configuration .*config.yaml, line 3: "),
        ("training: {lr: 1}\nlevels: {draws: 2}\ntraining: {lr: 2}", "line 3: 'training' is there twice"),
        ("training: {lr: 1, 'lr': 1}", "line 1: 'lr' is there twice"),
        (
            "domain: {problem: moons}",
            "needs levels with a distribution, as those of mog40 do not fit moons: take a pre",
        ),
        ("domain: {kind: pictures, data: digits}\nlevels: {draws: 2}", "those of mog40 do not fit pictures"),
        ("problem: 2001-99-99", "cannot read the configuration .*: month must be in 1..12"),
        (f"problem: {'[' * 3000}{']' * 3000}", "cannot read the configuration .*: maximum recursion depth exceeded"),
        ("problem: !!timestamp x", "cannot read the configuration"),
        ("!!python/object/apply:os.system [exit]", "cannot read the configuration"),
    ],
)
def test_what_does_not_fit_is_named(text: str, match: str, tmp_path: Path) -> None:
    refusal(match, text, tmp_path)


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write(Config(), path)

    def full(self: Path, text: str, **options: Any) -> None:
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UsageError, match=r"cannot write .*config\.yaml: No space left on device"):
        write(Config(PointsConfig("mog9")), path)
    assert read(Config, path) == Config()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the configuration .*none.yaml"):
        read(Config, tmp_path / "none.yaml")
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UsageError, match="cannot read the configuration"):
        read(Config, tmp_path / "config.yaml")


def test_a_source_that_is_here_is_kept_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder it is found, and not looked up on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "t").mkdir(parents=True)
    source = str(tmp_path / "runs" / "t")
    pictures = PicturesConfig(teacher="runs/t", data="hf:runs/t", features="runs/t")
    assert (pictures.teacher, pictures.data, pictures.features) == (source, f"hf:{source}", source)
    assert TeacherConfig("learned", Path("runs/t")).teacher_run == Path(source)
    assert PicturesTeachConfig("runs/t").data == source
    assert (PicturesTeachConfig("digits").data, PicturesConfig(teacher="a/b").teacher) == ("digits", "a/b")


POSITIVE = ("steps", "batch", "lr", "auxiliary_lr", "clip", "log_every", "checkpoint_every", "eval_samples")


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", [*POSITIVE, "max_minutes", "keep_checkpoints", "accumulate"])
def test_numbers_of_a_run_must_be_positive(name: str, value: int, tmp_path: Path) -> None:
    refusal(f"^{name} must be (positive|at least 1).*, but is {value}", f"training: {{{name}: {value}}}", tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", math.inf), ("lr", math.nan), ("auxiliary_lr", math.nan), ("clip", math.nan), ("max_skipped", -1),
        ("weight_decay", -0.1), ("eval_every", -1), ("beta1", 1.0), ("beta2", -0.1), ("ema", 1.0), ("warmup", 1.0),
        ("lr_final", 1.1), ("milestones", 0),
    ],
)  # fmt: skip
def test_numbers_of_a_run_have_their_ranges(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} must be .*, but is {value}"):
        TrainingConfig(**{name: value})


@pytest.mark.parametrize(
    ("cls", "name", "value", "told"),
    [
        (TrainingConfig, "lr_schedule", "cosin", "did you mean cosine"),
        (TrainingConfig, "precision", "bf", "did you mean bf16"),
        (TrainingConfig, "tracker", "x", "known: none, tensorboard"),
        (TrainingConfig, "clock", "gpu", "did you mean cpu"),
        (PointsConfig, "problem", "mog", "did you mean mog9 or mog40"),
        (PointsTeachConfig, "problem", "mog", "did you mean mog9 or mog40"),
        (PerceptronConfig, "kind", "latent", "did you mean latents"),
        (PerceptronConfig, "activation", "ReLU", "did you mean relu|known: gelu"),
        (TeacherConfig, "teacher", "exact", "known: empirical, learned, true"),
        (VarDiUConfig, "posterior", "gaussian", "known: coupling, diagonal, full"),
        (VarFlowConfig, "real", "Data", "did you mean data"),
        (DiffInstructConfig, "critic_start", "Teacher", "did you mean teacher"),
        (LevelsConfig, "weight", "snrr", "did you mean snr"),
        (PointsConfig, "schedule", "cosines", "did you mean cosine"),
        (PicturesTeachConfig, "clock", "wal", "did you mean wall"),
        (NetworkStudentConfig, "start", "Teacher", "did you mean teacher"),
        (VarFlowConfig, "space", "dat", "did you mean data"),
    ],
)
def test_choices_are_checked_without_a_file_too(cls: Any, name: str, value: str, told: str) -> None:
    with pytest.raises(UsageError, match=f"^unknown {name} '{value}': ({told})"):
        cls(**{name: value})


ALL_TYPES = [
    TrainingConfig, PointsTeachConfig, PerceptronConfig, TeacherConfig, VarDiUConfig, VarFlowConfig, DiffInstructConfig,
    LevelsConfig, UNetConfig, PicturesTeachConfig, NetworkStudentConfig,
]  # fmt: skip
WHOLE = [(cls, f.name) for cls in ALL_TYPES for f in dataclasses.fields(cls) if f.type == "int"]


@pytest.mark.parametrize("value", [2.5, True, "2", None, 2**63])
@pytest.mark.parametrize(("cls", "name"), WHOLE)
def test_whole_numbers_are_checked_without_a_file_too(cls: Any, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} must be a whole number of 64 bits, but is {value}$"):
        cls(**{name: value})


def test_whole_numbers_may_be_of_any_kind_and_candidates_the_batch() -> None:
    assert TrainingConfig(steps=np.int64(3), seed=-(2**63)).steps == 3
    assert VarDiUConfig(candidates="batch").candidates == "batch"
    misspelt: Any = "bach"
    with pytest.raises(UsageError, match="^candidates must be 'batch' or 'chain' or a whole number .* but is bach$"):
        VarDiUConfig(candidates=misspelt)


def test_adapters_of_a_critic_start_as_the_teacher() -> None:
    with pytest.raises(UsageError, match="critic_start must be 'teacher' with a critic_rank, but is fresh"):
        DiffInstructConfig(critic_rank=4)


def test_what_a_teacher_does_not_use_is_refused() -> None:
    with pytest.raises(UsageError, match="teacher must be 'learned' with a teacher_run, but is true"):
        TeacherConfig(teacher_run=Path("somewhere"))
    with pytest.raises(UsageError, match="teacher must be 'empirical' with a bandwidth, but is learned"):
        TeacherConfig("learned", bandwidth=3.0)


@pytest.mark.parametrize("name", ["samples", "steps", "batch", "lr", "depth", "width"])
def test_numbers_of_a_teacher_must_be_positive(name: str, tmp_path: Path) -> None:
    refusal(f"^{name} must be positive, but is 0", f"kind: PointsTeach\n{name}: 0", tmp_path, PointsTeachConfig)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("domain.student", "depth", 0), ("domain.student", "width", -1), ("domain.student", "latent", 0),
        ("domain.student", "fourier", -1), ("domain.student", "steps_per_sample", 0), ("domain.student", "ratio", 0.0),
        ("domain.teacher", "teacher_samples", 0), ("domain.teacher", "bandwidth", -1.0),
        ("vardiu", "candidates", -1), ("vardiu", "posterior_steps", 0), ("vardiu", "posterior_width", 0),
        ("vardiu", "posterior_rank", 0), ("vardiu", "pool", -1), ("levels", "draws", 0), ("levels", "shared", -1),
        ("varflow", "beta", 0.0), ("varflow", "beta", 2.0), ("varflow", "real_samples", 0),
        ("varflow", "real_steps", 0), ("varflow", "label_distance", 0.0), ("diff-instruct", "critic_steps", 0),
        ("diff-instruct", "critic_width", 0), ("diff-instruct", "critic_rank", -1),
        ("part", "weight", 0.0), ("part", "weight_end", -1.0), ("part", "weight", math.inf),
    ],
)  # fmt: skip
def test_numbers_of_the_parts_are_checked_before_anything_is_built(
    section: str, name: str, value: float, tmp_path: Path
) -> None:
    text = {
        "part": "objective: {{kind: sum, parts: [{{{}}}]}}",
        "domain.student": "domain: {{student: {{{}}}}}",
        "domain.teacher": "domain: {{teacher: {{{}}}}}",
        "levels": "levels: {{{}}}",
    }.get(section, f"objective: {{{{kind: {section}, {{}}}}}}")
    written = ".inf" if value == math.inf else value
    refusal(f"^{name} must be .*, but is {value}", text.format(f"{name}: {written}"), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("beta1", 1.0), ("lr", 0.0), ("lr", math.inf), ("clip", 0.0), ("weight_decay", -1.0)]
)
def test_numbers_of_a_network_have_their_ranges(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"^critic's {name} must be .*, but is {value}"):
        NetworkConfig("critic", **{name: value})


def test_configurations_do_not_import_torch() -> None:
    code = "import sys, vardistill.runs.config, vardistill.runs.presets; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
