"""Student and critic on one base through the trainer, alone and in two processes; itself the script that each runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_models import tiny_unet
from vardistill.denoisers import Adapted, DiffusersDenoiser
from vardistill.objectives.sid import SiD
from vardistill.runs.distill import distill
from vardistill.students import NetworkStudent
from vardistill.training.config import TrainingConfig


def trained(precision: Any = "no") -> tuple[dict[str, Tensor], bool]:
    """All adapters after three steps of SiD, whose gradients pass through critic and base; whether the base is as it
    was."""
    torch.manual_seed(0)
    base = DiffusersDenoiser(tiny_unet(), diffusers.DDPMScheduler())
    before = {name: v.clone() for name, v in base.state_dict().items()}
    student, critic = NetworkStudent.from_teacher(base, rank=2), Adapted(base, 2)
    objective = SiD(base, critic)
    for denoiser in (base, student.denoiser, critic):
        denoiser.network.enable_gradient_checkpointing()
    training = TrainingConfig(
        steps=3, batch=8, lr=1e-2, warmup=0, ema=0.5, tracker="none", device="cpu", precision=precision
    )
    run = distill(student, objective=objective, training=training)
    own = {"student": student, "critic": critic, "average": run.generator}
    unmoved = all(torch.equal(v, before[name]) for name, v in base.state_dict().items())
    return {f"{who}.{name}": v for who, module in own.items() for name, v in module.state_dict().items()}, unmoved


def test_student_and_critic_learn_and_the_base_does_not() -> None:
    weights, unmoved = trained()
    assert unmoved
    factors = {name: v for name, v in weights.items() if "lora_B" in name}
    assert all(v.abs().max() > 0 for v in factors.values())
    pairs = [(v, factors[name.replace("student.", "average.")]) for name, v in factors.items() if "student." in name]
    assert not any(torch.equal(own, average) for own, average in pairs)


def test_in_bfloat16_the_base_stays_too() -> None:
    weights, unmoved = trained("bf16")
    assert unmoved
    assert all(v.isfinite().all() and v.dtype == torch.float32 for v in weights.values())


@pytest.mark.slow
def test_two_processes_train_the_adapters_that_one_trains(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / f"{i}.safetensors")],
            env=os.environ | common | {"RANK": str(i), "LOCAL_RANK": str(i), "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    alone, _ = trained()
    first, second = (load_file(tmp_path / f"{i}.safetensors") for i in range(2))
    assert alone.keys() == first.keys()
    for name, v in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], v, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    weights, unmoved = trained()
    assert unmoved
    save_file({name: v.clone() for name, v in weights.items()}, sys.argv[1])
