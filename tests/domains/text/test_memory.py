"""What saves memory on one base changes no gradient: checkpointing, and a base in half precision under adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_pipelines
from vardistill.domains.pictures.config import NetworkStudentConfig
from vardistill.domains.text.config import TextConfig
from vardistill.errors import UsageError
from vardistill.objectives.diff_instruct import DiffInstructConfig
from vardistill.runs.experiment import build_domain
from vardistill.runs.presets import PRESETS
from vardistill.training.loop import Trainer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in tiny_pipelines.MAKERS.items()}


def trainer_of(folder: Path, rank: int, **student: Any) -> Trainer:
    """Of Diff-Instruct with a critic on the same base, or with copies of it."""
    preset = PRESETS["text-diff-instruct"].config
    (folder / "prompts.txt").write_text("a red dog\na blue cat\n")
    settings = NetworkStudentConfig(lora_rank=rank, **student)
    config = replace(
        preset,
        domain=TextConfig(str(folder), prompts=str(folder / "prompts.txt"), guidance=2.0, student=settings),
        objective=DiffInstructConfig(critic_start="teacher", critic_rank=rank),
        training=replace(preset.training, steps=4, batch=4, device="cpu", precision="no", tracker="none"),
    )
    domain = build_domain(config)
    domain.load(None)
    levels = config.levels.build(domain.schedule, domain.data_std)
    return Trainer(
        domain.student, config.objective.build(domain), levels, config.training, conditions=domain.conditions
    )


def gradients(trainer: Trainer) -> dict[str, list[Tensor]]:
    """Of student and critic, in a step of fresh adapters that have moved."""
    rng = torch.Generator().manual_seed(0)
    for parameters in trainer.trainable.values():
        for p in parameters:
            p.data += 0.02 * torch.randn(p.shape, generator=rng)
    found = {}
    for number, update in enumerate(trainer.objective.updates(0.5)):
        trainer.backward(update, trainer.draw(update, 0.5, number))
        (name,) = update.trains
        found[name] = [p.grad for p in trainer.trainable[name] if p.grad is not None]
        assert any(g.abs().max() > 0 for g in found[name])
        for p in trainer.trainable[name]:
            p.grad = None
    return found


@pytest.mark.parametrize(("family", "rank"), [("sd", 2), ("sdxl", 0), ("sd3", 2)])
def test_checkpointing_changes_no_gradient(family: str, rank: int, folders: dict[str, Path]) -> None:
    plain = gradients(trainer_of(folders[family], rank))
    trainer = trainer_of(folders[family], rank, gradient_checkpointing=True)
    networks: list[Any] = [trainer.student.denoiser.network, trainer.networks["critic"].network]  # type: ignore[union-attr]
    assert all(network.is_gradient_checkpointing for network in networks)
    runs = 0

    def counted(*_: Any) -> None:
        nonlocal runs
        runs += 1

    blocks = networks[0].transformer_blocks[0] if family == "sd3" else networks[0].down_blocks[0].resnets[0]
    blocks.register_forward_pre_hook(counted)
    again = gradients(trainer)
    assert runs == 3  # to the critic's update, to the student's, and in that one's backward pass
    assert plain.keys() == again.keys() == {"student", "critic"}
    for name, own in plain.items():
        for a, b in zip(own, again[name], strict=True):
            assert (a - b).abs().max() <= 1e-6 * a.abs().max()


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_adapters_train_on_a_base_in_half_precision(family: str, folders: dict[str, Path]) -> None:
    """The base stays as it was, and the step goes where that on a base in single precision goes."""
    trainer, single = trainer_of(folders[family], 2, base_precision="bf16"), trainer_of(folders[family], 2)
    base: Any = trainer.student.denoiser.network  # type: ignore[union-attr]
    weights = {name: v.detach().clone() for name, v in base.named_parameters() if ".lora_" not in name}
    assert {v.dtype for v in weights.values()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
    half, full = gradients(trainer), gradients(single)
    for name, own in half.items():
        a, b = (torch.cat([g.flatten() for g in found]) for found in (own, full[name]))
        assert torch.nn.functional.cosine_similarity(a, b, 0) > 0.99
    before = [p.detach().clone() for p in trainer.student.parameters()]
    for step in range(3):
        trainer.advance(step / 3)
    assert float(trainer.skipped) == 0
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.student.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)  # some layers of SD3's last block have no part in its output
    assert all(torch.equal(v, dict(base.named_parameters())[name]) for name, v in weights.items())
    merged = trainer.student.merged()  # type: ignore[operator]
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


def test_a_base_in_half_precision_needs_adapters() -> None:
    with pytest.raises(UsageError, match="base_precision must be fp32 without a lora_rank, whose base it is of"):
        NetworkStudentConfig(base_precision="bf16")
