"""Objectives of users' files: named, kept, opened, and never run unasked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vardistill.errors import UsageError
from vardistill.objectives.registry import OwnConfig, SumConfig, takes_teacher, title_of
from vardistill.runs.config import Config
from vardistill.runs.experiment import build_domain, check, real_samples
from vardistill.runs.own import check_resumed, opened
from vardistill.runs.presets import find_preset, with_objective
from vardistill.training import config_files
from vardistill.training.loop import Trainer

FILE = """
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
from vardistill.objectives import Needs, Objective
from vardistill.objectives.base import RealConfig, inner

with Path(__file__).with_name("ran").open("a") as log:
    log.write("x")


@dataclass(frozen=True)
class MeansConfig(RealConfig):
    strength: float = 1.0
    powers: tuple[int, ...] = (1,)

    @property
    def takes_teacher(self):
        return self.real == "teacher"

    def build(self, parts):
        return Means(self)


class Means(Objective):
    def __init__(self, config):
        super().__init__(None)
        self.config = config

    @property
    def needs(self):
        return Needs(real=True)

    def generator_loss(self, draw):
        difference = draw.x_t.detach().mean(0) - draw.real_t.mean(0)
        return self.config.strength * inner(difference.expand_as(draw.x_t), draw.x_t)


@dataclass(frozen=True)
class SilentConfig:
    def build(self, parts):
        return Means(MeansConfig())


class Plain:
    def build(self, parts): ...
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "own files" / "mine.py"
    path.parent.mkdir()
    path.write_text(f"# {tmp_path}\n{FILE}")  # of its own digest
    return path


def ran(mine: Path) -> bool:
    """Whether the file has run since this was asked."""
    log = mine.with_name("ran")
    found = log.exists()
    log.unlink(missing_ok=True)
    return found


def named(text: str, preset: str = "moons-vardiu") -> Config:
    config = with_objective(find_preset(preset), text)
    training = replace(config.training, steps=2, batch=16, tracker="none", device="cpu", log_every=1)
    return replace(config, training=training)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("{folder}/none.py:X", "cannot read the objective's file"),
        ("{mine}", "say which class of it is meant"),
        ("{mine}:Mean", "unknown class of mine.py 'Mean': did you mean MeansConfig"),
        ("{mine}:Means", r"Means of mine.py has no build\(parts\)"),
        ("{mine}:Plain", "Plain of mine.py is no dataclass"),
        ("{mine}:MeansConfig(strenth=2)", "unknown key in .*'strenth': did you mean strength"),
        ("{mine}:MeansConfig(strength=much)", "strength must be float"),
        ("{mine}:MeansConfig(real=nowhere)", "real must be"),
        ("{mine}:MeansConfig + {mine}:MeansConfig", "of different kinds"),
        ("{folder}:X", "FILE.py:CLASS"),
        ("{folder}/broken.py:X", "broken.py, line 2: NameError: name 'undefined' is not defined"),
        ("{folder}/unread.py:X", "unread.py, line 1: SyntaxError"),
    ],
)
def test_mistakes_get_one_line(spec: str, line: str, mine: Path) -> None:
    (mine.parent / "broken.py").write_text("\nundefined\n")
    (mine.parent / "unread.py").write_text("def f(:\n")
    with pytest.raises(UsageError, match=line) as told:
        named(spec.format(mine=mine, folder=mine.parent))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("spec", "real", "teacher"),
    [
        ("{}:MeansConfig(strength=1e-1, powers=[1, 2])", "teacher", True),
        ("{}:MeansConfig(real=data)", "data", False),
        ("{}:SilentConfig", "teacher", True),
        ("vardiu + 2..1*{}:MeansConfig(shared=2, strength=3)", "teacher", True),
    ],
)
def test_a_run_of_ones_own_objective_trains_and_is_kept(
    spec: str, real: str, teacher: bool, mine: Path, tmp_path: Path
) -> None:
    config, path = named(spec.format(mine)), tmp_path / "config.yaml"
    config_files.write(config, path)
    assert ran(mine)
    assert config_files.read(Config, path) == config
    assert takes_teacher(config.objective) == teacher
    assert not ran(mine)

    itself = opened(config)
    domain = build_domain(itself)
    check(itself, domain)
    objective: Any = itself.objective.build(domain)
    levels = itself.levels.build(domain.schedule, domain.data_std)
    samples = real_samples(itself, domain, objective)
    run = Trainer(domain.student, objective, levels, itself.training, None, None, samples, domain.conditions).run()
    assert len(run.history) == 2
    if real == "data":
        assert samples == domain.problem.sample


def own_of(config: Config) -> OwnConfig:
    assert isinstance(config.objective, OwnConfig)
    return config.objective


def test_options_are_the_classs(mine: Path) -> None:
    config = named(f"{mine}:MeansConfig(strength=1e-1, powers=[1, 2])")
    itself: Any = opened(config).objective
    assert (itself.strength, itself.powers) == (0.1, (1, 2))
    assert own_of(config).source == f"{mine.resolve()}:MeansConfig"
    assert title_of(config.objective) == "Means"
    assert config.training.head_start == 0
    of_sum = named(f"vardiu + 0.5*{mine}:MeansConfig")
    assert isinstance(of_sum.objective, SumConfig)
    assert str(of_sum.objective.parts[1]) == "0.5*Means"


def test_a_file_that_has_changed_is_refused(mine: Path) -> None:
    config = named(f"{mine}:MeansConfig")
    mine.write_text(mine.read_text() + "\n# changed\n")
    with pytest.raises(UsageError, match="is not what it was when the run began"):
        opened(config)
    unchecked = replace(config, objective=replace(own_of(config), digest=None))
    assert opened(unchecked).objective.strength == 1


@pytest.mark.parametrize("change", [{"source": "mine.py:MeansConfig"}, {"digest": None}, {}])
def test_what_a_run_folder_brings_is_not_run(change: dict[str, Any], mine: Path) -> None:
    """Its own files, files by a relative path, files of any content."""
    config = named(f"{mine}:MeansConfig")
    ran(mine)
    check_resumed(config, mine.parent.parent / "run")
    changed = replace(config, objective=replace(own_of(config), **change))
    with pytest.raises(UsageError, match="what a folder brings is not run"):
        check_resumed(changed, mine.parent.parent / "run" if change else mine.parent)
    assert not ran(mine)
