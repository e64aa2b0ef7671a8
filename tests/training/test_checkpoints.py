"""Checkpoints: whole or not at all, and nothing but one's own is believed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import small_runs
from operator_counter import OperatorCounter
from vardistill.errors import UsageError
from vardistill.runs.distill import distill
from vardistill.students.perceptron import MLP
from vardistill.training import checkpoints
from vardistill.training.checkpoints import State, latest, load, match, save, set_aside_damaged


def state(step: int = 3) -> State:
    weight = torch.arange(6.0).view(2, 3)
    tensors = {
        "network.student": {"weight": weight, "tied": weight, "transposed": weight.T, "row": weight[0].expand(4, 3)},
        "counters": {"skipped": torch.tensor(2.0), "half": torch.ones(3, dtype=torch.bfloat16)},
    }
    return State(step, 1.5, tensors)


def refusal(act: Callable[[], Any], match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        act()
    assert "\n" not in str(caught.value)


class TestKeeping:
    def test_a_state_comes_back_as_it_was(self, tmp_path: Path) -> None:
        kept = load(save(tmp_path, state(), keep=2))
        assert (kept.step, kept.seconds) == (3, 1.5)
        assert kept.tensors.keys() == state().tensors.keys()
        for section, part in state().tensors.items():
            assert kept.tensors[section].keys() == part.keys()
            for name, v in part.items():
                assert kept.tensors[section][name].dtype == v.dtype
                assert torch.equal(kept.tensors[section][name], v)

    def test_tensors_are_copied_straight_to_the_host(self) -> None:
        """One copy into memory of the host, and nothing beside it, of whatever strides the tensor is."""
        for name, v in state().tensors["network.student"].items():
            with OperatorCounter() as operators:
                copied = checkpoints._copy(v.requires_grad_() if name == "weight" else v)
            assert [operator for operator in operators.names if "detach" not in operator] == [
                "aten.empty.memory_format",
                "aten.copy_.default",
            ]
            assert copied.device.type == "cpu"
            assert copied.is_contiguous()
            assert not copied.requires_grad
            assert copied.untyped_storage().nbytes() == v.numel() * v.element_size()
            assert copied.data_ptr() != v.data_ptr()
            assert torch.equal(copied, v)

    def test_the_latest_are_kept(self, tmp_path: Path) -> None:
        for step in (5, 99_999_999, 100_000_000, 7_000_000_000):
            save(tmp_path, state(step), keep=2)
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-100000000", "step-7000000000"]
        assert load(latest(tmp_path)).step == 7_000_000_000

    def test_a_checkpoint_cut_short_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(tmp_path, state(1), keep=1)

        def full(*arguments: Any, **options: Any) -> None:
            save_file(*arguments, **options)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints, "save_file", full)
        refusal(lambda: save(tmp_path, state(2), keep=1), "cannot write .*step-00000002: No space left on device")
        assert latest(tmp_path).name == "step-00000001"
        monkeypatch.undo()
        save(tmp_path, state(4), keep=1)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]

    def test_none_is_removed_before_the_next_is_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(tmp_path, state(1), keep=1)
        whole: list[bool] = []
        rmtree = shutil.rmtree

        def watched(path: Path) -> None:
            whole.append(load(tmp_path / "step-00000002").step == 2)
            rmtree(path)

        monkeypatch.setattr(shutil, "rmtree", watched)
        save(tmp_path, state(2), keep=1)
        assert whole == [True]

    @pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
    def test_the_one_before_is_taken_where_the_latest_are_damaged(
        self, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for step in (1, 2, 3, 4):
            save(tmp_path, state(step), keep=4)
        for step in (1, 3, 4):
            damaged = tmp_path / f"step-{step:08d}" / file
            damaged.write_bytes(damaged.read_bytes()[:-1])
        checkpoints.set_aside_damaged(tmp_path)
        assert load(latest(tmp_path)).step == 2
        assert save(tmp_path, state(3), keep=4).name == "step-00000003"
        told = capsys.readouterr().err.splitlines()
        assert [line.rpartition(": ")[2] for line in told] == ["going back to step-00000002"] * 2

    def test_one_that_is_damaged_and_alone_stays(self, tmp_path: Path) -> None:
        (save(tmp_path, state(), keep=1) / "state.json").unlink()
        checkpoints.set_aside_damaged(tmp_path)
        assert latest(tmp_path).name == "step-00000003"

    def test_the_same_step_is_kept_once(self, tmp_path: Path) -> None:
        first = save(tmp_path, state(), keep=1)
        written = (first / "state.safetensors").stat().st_mtime_ns
        assert save(tmp_path, state(), keep=1) == first
        assert (first / "state.safetensors").stat().st_mtime_ns == written


class Bomb:
    """Pickled, it leaves a file where it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


class TestRefusing:
    @pytest.fixture
    def kept(self, tmp_path: Path) -> Path:
        return save(tmp_path / "checkpoints", state(), keep=2)

    def test_none(self, tmp_path: Path) -> None:
        refusal(lambda: latest(tmp_path), "nothing to resume: no checkpoint in")

    @pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
    @pytest.mark.parametrize("size", [0, 5, 20])
    def test_a_truncated_file(self, file: str, size: int, kept: Path) -> None:
        (kept / file).write_bytes((kept / file).read_bytes()[:size])
        refusal(lambda: load(kept), "is truncated or not one of vardistill's")

    def test_a_file_that_lost_its_end(self, kept: Path) -> None:
        (kept / "state.safetensors").write_bytes((kept / "state.safetensors").read_bytes()[:-1])
        refusal(lambda: load(kept), "is truncated or not one of vardistill's")

    def test_a_flipped_bit(self, kept: Path) -> None:
        content = bytearray((kept / "state.safetensors").read_bytes())
        content[-3] ^= 1
        (kept / "state.safetensors").write_bytes(content)
        refusal(lambda: load(kept), "is damaged: its tensors are not those that were written")

    def test_a_flipped_bit_is_gone_back_from(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first, last = (save(tmp_path, state(step), keep=2) for step in (1, 2))
        content = bytearray((last / "state.safetensors").read_bytes())
        content[-3] ^= 1
        (last / "state.safetensors").write_bytes(content)
        set_aside_damaged(tmp_path)
        assert latest(tmp_path) == first
        assert "is damaged, and now damaged-step-00000002" in capsys.readouterr().err

    @pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
    def test_a_missing_file(self, file: str, kept: Path) -> None:
        (kept / file).unlink()
        refusal(lambda: load(kept), "is truncated or not one of vardistill's")

    @pytest.mark.parametrize("counters", ["[]", "{}", "null", '{"step": "x", "seconds": 1, "format": "a"}', "\xff"])
    def test_counters_of_another_kind(self, counters: str, kept: Path) -> None:
        (kept / "state.json").write_bytes(counters.encode("latin-1"))
        refusal(lambda: load(kept), "is truncated or not one of vardistill's")

    def test_another_format(self, kept: Path) -> None:
        counters = json.loads((kept / "state.json").read_text())
        (kept / "state.json").write_text(json.dumps(counters | {"format": "other-2"}))
        refusal(lambda: load(kept), "has format 'other-2', but this version reads 'vardistill-checkpoint-3'")

    @pytest.mark.parametrize("protocol", [0, 2, 5])
    def test_a_pickle_in_disguise(self, protocol: int, kept: Path, tmp_path: Path) -> None:
        trace = tmp_path / "executed"
        disguise = pickle.dumps(Bomb(trace), protocol)
        (kept / "state.safetensors").write_bytes(disguise)
        refusal(lambda: load(kept), "is truncated or not one of vardistill's")
        torch.save({"weight": Bomb(trace)}, kept / "state.safetensors")
        refusal(lambda: load(kept), "is truncated or not one of vardistill's")
        assert not trace.exists()
        pickle.loads(disguise)
        assert trace.exists()

    @pytest.mark.parametrize("linked", ["", "state.json", "state.safetensors"])
    def test_a_link_that_leaves_the_run(self, linked: str, kept: Path, tmp_path: Path) -> None:
        outside = save(tmp_path / "elsewhere", state(), keep=1)
        inside = kept / linked
        shutil.rmtree(inside) if inside.is_dir() else inside.unlink()
        inside.symlink_to(outside / linked)
        refusal(lambda: load(latest(kept.parent)), "leads out of its run folder: refused")

    def test_other_names_shapes_and_dtypes(self) -> None:
        own = {"a": torch.zeros(2), "b": torch.zeros(3)}
        match("network.student", own, own)
        refusal(lambda: match("network.student", {"a": own["a"]}, own), "the checkpoint lacks network.student 'b'")
        refusal(
            lambda: match("network.student", own | {"c": own["a"]}, own), "only the checkpoint has network.student 'c'"
        )
        refusal(
            lambda: match("network.student", own | {"a": torch.zeros(4)}, own), r"'a' is \(4,\) of torch.float32 there"
        )
        refusal(lambda: match("network.student", own | {"a": own["a"].double()}, own), "torch.float64 there")


class TestResuming:
    """What a run takes back, and that it takes all or nothing."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        out = tmp_path / "run"
        self.distill(out, resume=False)
        return out

    @staticmethod
    def distill(out: Path, generator: MLP | None = None, resume: bool = True, **options: Any) -> MLP:
        generator = small_runs.generator() if generator is None else generator
        options = {"objective": small_runs.objective("learned"), "levels": small_runs.levels()} | options
        training = small_runs.config(steps=4 if resume else 2, checkpoint_every=2)
        distill(generator, training=training, out=out, resume=resume, **options)
        return generator

    def refused(self, run: Path, match: str, generator: MLP | None = None, **options: Any) -> None:
        generator = small_runs.generator() if generator is None else generator
        before = {name: v.clone() for name, v in generator.state_dict().items()}
        refusal(lambda: self.distill(run, generator, **options), match)
        for name, v in generator.state_dict().items():
            assert torch.equal(v, before[name])

    @staticmethod
    def rewrite(run: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        file = latest(run / "checkpoints") / "state.safetensors"
        tensors = load_file(file)
        change(tensors)
        TestResuming.replace(file, tensors)

    @staticmethod
    def replace(file: Path, tensors: dict[str, torch.Tensor]) -> None:
        """By one who tells no digest, as versions before it did."""
        save_file(tensors, file)
        counters = json.loads(file.with_name("state.json").read_text())
        file.with_name("state.json").write_text(json.dumps({k: v for k, v in counters.items() if k != "sha256"}))

    def test_a_wider_model(self, run: Path) -> None:
        wider = MLP(latent=2, data=2, depth=1, width=9, data_std=2.0).double()
        self.refused(run, r"is another one: student.parameters was 42 and is 47", wider)

    def test_a_deeper_model(self, run: Path) -> None:
        deeper = MLP(latent=2, data=2, depth=2, width=8, data_std=2.0).double()
        self.refused(run, "is another one: student.parameters was", deeper)

    def test_a_model_of_another_dtype(self, run: Path) -> None:
        teacher = small_runs.GaussianMixture(small_runs.MEANS.float(), std=0.5, schedule=small_runs.VE())
        single = small_runs.VarDiU(teacher, small_runs.FullGaussian(2, 2, 2.0, depth=1, width=8))
        self.refused(run, "is another one: teacher", small_runs.generator().float(), objective=single)

    def test_another_objective(self, run: Path) -> None:
        self.refused(run, "candidates was 0 and is batch", objective=small_runs.objective("batch"))

    def test_a_foreign_file(self, run: Path) -> None:
        file = latest(run / "checkpoints") / "state.safetensors"
        self.replace(file, nn.Linear(2, 2).state_dict())
        self.refused(run, "is of another model")

    @pytest.mark.parametrize(
        "name",
        ["counters/skipped", "optimizer.student/0/exp_avg", "optimizer.posterior/1/step", "average/layers.0.weight"],
    )
    def test_a_part_that_is_missing_or_of_another_shape(self, name: str, run: Path) -> None:
        self.rewrite(run, lambda tensors: tensors.update({name: tensors[name].new_zeros(3, 3)}))
        self.refused(run, "is of another model")
        self.rewrite(run, lambda tensors: tensors.pop(name))
        self.refused(run, "the checkpoint lacks")

    def test_what_fits_is_taken(self, run: Path) -> None:
        self.distill(run)
        assert latest(run / "checkpoints").name == "step-00000004"
