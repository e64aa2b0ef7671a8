"""Predicted bytes are those of the tensors that a trainer holds."""

from __future__ import annotations

import diffusers

from tiny_models import tiny_unet
from vardistill.denoisers import Adapted, DiffusersDenoiser, Mixed
from vardistill.diffusion.levels import EDM
from vardistill.diffusion.noise import NoiseLevels
from vardistill.objectives import DiffInstruct
from vardistill.students import NetworkStudent
from vardistill.training.config import TrainingConfig
from vardistill.training.loop import Trainer
from vardistill.training.memory import predicted_memory


def test_it_is_what_a_trainer_holds() -> None:
    """One base; moments of Adam for the adapters of student and critic; an average of the student's."""
    base = DiffusersDenoiser(tiny_unet(), diffusers.DDPMScheduler())
    student, critic = NetworkStudent.from_teacher(base, rank=2), Adapted(base, 3)
    objective = DiffInstruct(base, Mixed(critic))
    told = predicted_memory({"student": student, **objective.networks}, [objective.teacher])
    training = TrainingConfig(steps=1, batch=4, tracker="none", device="cpu", precision="no")
    trainer = Trainer(student, objective, NoiseLevels(base.schedule, EDM()), training)
    trainer.advance(0.5)

    def sizes(tensors: object) -> int:
        return sum(v.numel() * v.element_size() for v in tensors)  # type: ignore[attr-defined]

    own = sizes(student.parameters()), sizes(critic.parameters())
    states = [s for o in trainer.optimizers.values() for s in o.state.values()]
    assert told == {
        "parameters": sizes(base.parameters()) + sizes(base.buffers()) + sum(own),
        "gradients": max(own),
        "optimiser": sizes(s[name] for s in states for name in ("exp_avg", "exp_avg_sq")),
        "average": sizes(trainer.average.parameters()),
    }


def test_whole_copies_are_counted_each() -> None:
    base = DiffusersDenoiser(tiny_unet(), diffusers.DDPMScheduler())
    student = NetworkStudent.from_teacher(base)
    alone = predicted_memory({"student": student}, average=False)
    assert alone["optimiser"] == 2 * alone["gradients"] == 2 * alone["parameters"]
    assert alone["average"] == 0
    both = predicted_memory({"student": student}, [base, object()])
    assert both["parameters"] == 2 * alone["parameters"]
    assert both["average"] == alone["parameters"]
