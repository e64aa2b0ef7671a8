"""Run folders: made, written, read and rewound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import small_runs
from vardistill.errors import UsageError
from vardistill.training.folder import RunFolder, create, environment, open_run


def refusal(path: Path, match: str, act=create) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        act(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = create(tmp_path / "a" / "b")
    assert folder.path.is_dir()
    assert not any(folder.path.iterdir())
    assert create(tmp_path / "a" / "b") == folder


def test_a_folder_in_use_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()
    refusal(tmp_path, "is not empty: choose another with --out, or go on with --resume")
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_folder_that_cannot_be_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refusal(tmp_path / below, f"cannot write the run folder .*{below}: ")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    refusal(tmp_path, "cannot write the run folder .*: Permission denied")


def test_the_first_process_makes_the_folder_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        for name, value in small_runs.launched(2, rank).items():
            monkeypatch.setenv(name, value)
        folder = create(tmp_path / str(rank))
        assert folder.path.exists() == (rank == 0)
        with folder.held():
            assert folder.lock.exists() == (rank == 0)


def test_a_rank_that_was_left_over_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert create(tmp_path / "run").path.is_dir()


def test_a_run_at_work_is_left_alone(tmp_path: Path) -> None:
    folder = create(tmp_path)
    with folder.held(), pytest.raises(UsageError, match="another process is at work in .*: wait for it, or end it"):
        folder.held().__enter__()
    with folder.held():
        pass


def test_what_a_start_left_that_failed_does_not_block_the_next(tmp_path: Path) -> None:
    folder = create(tmp_path / "run")
    with folder.held():
        for path in (folder.config, folder.environment, folder.metrics):
            path.touch()
        (folder.checkpoints / ".partial-step-00000010").mkdir(parents=True)
    assert create(folder.path) == folder
    (folder.checkpoints / "step-00000010").mkdir()
    refusal(folder.path, "is not empty")
    (folder.checkpoints / "step-00000010").rmdir()
    (folder.path / "mine").touch()
    refusal(folder.path, "is not empty")


def test_what_is_no_run_is_not_opened(tmp_path: Path) -> None:
    refusal(tmp_path / "none", "is not a run folder: there is no such folder", open_run)
    refusal(tmp_path, "is not a run folder: it has no config.yaml", open_run)
    (tmp_path / "file").touch()
    refusal(tmp_path / "file", "is not a run folder: it is a file", open_run)
    (tmp_path / "config.yaml").touch()
    assert open_run(tmp_path) == RunFolder(tmp_path)


def rewind(path: Path) -> None:
    RunFolder(path).rewind(10)


class TestMetrics:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> RunFolder:
        folder = RunFolder(tmp_path)
        for step in (10, 20, 30):
            folder.log("train", step, step / 10, {"loss": 1 / step})
        return folder

    def test_they_come_back(self, folder: RunFolder) -> None:
        expected = [{"kind": "train", "step": s, "seconds": s / 10, "loss": 1 / s} for s in (10, 20, 30)]
        assert folder.history() == expected
        assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == expected

    def test_a_folder_without_them_has_an_empty_history(self, tmp_path: Path) -> None:
        assert RunFolder(tmp_path).history() == []

    @pytest.mark.parametrize("cut", [1, 2, 30])
    def test_a_line_cut_short_is_left_out_and_written_again(self, cut: int, folder: RunFolder) -> None:
        whole = folder.metrics.read_bytes()
        folder.metrics.write_bytes(whole[:-cut])
        assert [line["step"] for line in folder.history()] == ([10, 20, 30] if cut == 1 else [10, 20])
        folder.rewind(20)
        folder.log("train", 30, 3.0, {"loss": 1 / 30})
        assert folder.metrics.read_bytes() == whole

    def test_rewinding_drops_what_comes_after(self, folder: RunFolder) -> None:
        folder.rewind(10)
        assert [line["step"] for line in folder.history()] == [10]
        assert [path.name for path in folder.path.iterdir()] == ["metrics.jsonl"]

    @pytest.mark.parametrize("line", ["{}", "[1]", "3", '{"step": "10"}', '{"step": null}'])
    def test_lines_of_no_run_are_not_rewound(self, line: str, folder: RunFolder) -> None:
        with folder.metrics.open("a") as file:
            file.write(line + "\n")
        refusal(folder.path, "line 4 of .*metrics.jsonl is none of a run, as it has no step: remove it", rewind)

    @pytest.mark.parametrize("line", [b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
    def test_lines_that_cannot_be_read_are_refused(self, line: bytes, folder: RunFolder) -> None:
        folder.metrics.write_bytes(line)
        refusal(folder.path, "cannot read .*metrics.jsonl: ", rewind)


def test_the_environment_names_versions_and_hardware() -> None:
    facts = json.loads(json.dumps(environment()))
    assert {"python", "vardistill", "torch", "processor", "cores", "threads", "accelerator"} <= facts.keys()
    assert facts["threads"] == 1
