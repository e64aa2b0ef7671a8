"""What `distill` chooses where nothing is said."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import small_runs
import vardistill as vd
from linear_gaussian import Linears
from vardistill.denoisers import GaussianMixture, Preconditioned
from vardistill.diffusion.levels import LogNormal
from vardistill.diffusion.schedules import VE, VP, Cosine, Rectified
from vardistill.errors import UsageError
from vardistill.networks import LevelMLP
from vardistill.objectives import DiffInstruct, VarDiU, VarFlow
from vardistill.posteriors.few import Prior
from vardistill.students.perceptron import MLP
from vardistill.training.defaults import check_reach, default_levels, default_objective, with_default_levels


def trained(d: int) -> Preconditioned:
    return Preconditioned(LevelMLP(d, d, depth=1, width=8), 1.0, VE())


class TestObjective:
    @pytest.mark.parametrize("teacher", [GaussianMixture(torch.zeros(1, 4), std=1.0), trained(4)])
    def test_few_latents_take_the_batchs_candidates(self, teacher: vd.denoisers.Denoiser) -> None:
        objective = default_objective(teacher, MLP(latent=4, data=4))
        assert isinstance(objective, VarDiU)
        assert isinstance(objective.posteriors[0], Prior)
        assert objective.candidates == "batch"

    def test_above_them_a_trained_teacher_starts_the_critic(self) -> None:
        teacher = trained(5)
        objective = default_objective(teacher, MLP(latent=5, data=5, data_std=3.0))
        assert isinstance(objective, DiffInstruct)
        assert objective.critic is not teacher
        for a, b in zip(objective.critic.parameters(), teacher.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_labels_part_a_batch_so_its_latents_are_no_candidates(self) -> None:
        generator = Linears(torch.ones(2, 2, 2), torch.zeros(2, 2))
        assert isinstance(default_objective(trained(2), generator), DiffInstruct)

    @pytest.mark.parametrize(("latents", "classes"), [(5, 0), (2, 3)])
    def test_a_teacher_without_weights_has_none_above_them(self, latents: int, classes: int) -> None:
        """VarDiU with the batch's candidates collapses there (docs/results.md, digits)."""
        generator = MLP(latent=latents, data=5)
        generator.classes = classes
        with pytest.raises(UsageError, match="give the torch module itself; else give objective=, e.g. VarFlow"):
            default_objective(GaussianMixture(torch.zeros(1, 5), std=1.0), generator)


class TestLevels:
    @pytest.mark.parametrize(("exact", "least"), [(True, 0.05), (False, 0.2)])
    def test_an_unbiased_bound_of_a_trained_teacher_ends_where_its_scores_can_be_trusted(
        self, exact: bool, least: float
    ) -> None:
        teacher = GaussianMixture(torch.zeros(1, 2), std=1.0) if exact else trained(2)
        generator = MLP(data_std=2.0)
        _, levels = with_default_levels(default_objective(teacher, generator), generator, 8)
        assert isinstance(levels.distribution, LogNormal)
        assert levels.distribution.base_end == levels.distribution.broad_min == pytest.approx(2 * least)

    def test_they_scale_with_the_data(self, rng: torch.Generator) -> None:
        small, large = (default_levels(small_runs.teacher(), std, 2).distribution for std in (1.0, 10.0))
        u = torch.rand(100, generator=rng)
        torch.testing.assert_close(large(u, 0.3, VE()), 10 * small(u, 0.3, VE()))

    @pytest.mark.parametrize("data_std", [1e-3, 1.0, 1e3])
    def test_without_a_teacher_the_schedule_scales_with_them(self, data_std: float, rng: torch.Generator) -> None:
        levels = default_levels(None, data_std, 2, shared=8)
        noise = levels.draw((2,), 512, 0.3, rng)
        ratio = (noise.sigma / noise.alpha / data_std).sort().values
        reference = default_levels(None, 1.0, 2, shared=8).draw((2,), 512, 0.3, torch.Generator().manual_seed(0))
        torch.testing.assert_close(ratio, (reference.sigma / reference.alpha).sort().values)

    def test_varflow_learns_alike_at_any_scale(self) -> None:
        spreads = []
        for scale in (1e-3, 1.0, 1e3):
            rng = torch.Generator().manual_seed(0)
            data = scale * torch.randn(512, 2, generator=rng)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                generator = MLP(depth=1, width=16, data_std=2 * scale)
            training = vd.TrainingConfig(steps=60, batch=64, eval_every=0)
            run = vd.distill(generator, objective=VarFlow(), data=data, training=training)
            spreads.append(float(run.generator.sample(1000).std()) / scale)
        assert all(math.isclose(a, b, rel_tol=0.02) for a, b in pairwise(spreads))

    @pytest.mark.parametrize(
        ("data_std", "reached"), [(1e-3, False), (0.19, False), (0.21, True), (100, True), (101, False)]
    )
    def test_a_schedule_that_does_not_reach_them_is_refused(self, data_std: float, reached: bool) -> None:
        if reached:
            check_reach(VE(), data_std)
        else:
            with pytest.raises(
                UsageError, match=r"from 0.01 to 100, but data of standard deviation .* is data_std right"
            ):
                check_reach(VE(), data_std)

    @pytest.mark.parametrize("schedule", [VP(), Cosine(), Rectified(), VE(0.002, 80)])
    def test_the_usual_schedules_reach_the_usual_data(self, schedule: vd.schedules.Schedule) -> None:
        for data_std in (0.25, 0.5, 1.0):
            check_reach(schedule, data_std)

    def test_a_run_of_such_a_teacher_does_not_begin(self) -> None:
        teacher = GaussianMixture(torch.zeros(1, 2), std=1e-3)
        with pytest.raises(UsageError, match="noise-to-signal ratios"):
            vd.distill(MLP(data_std=1e-3), teacher=teacher)
