"""What an update draws: the same rows of any number of processes, from streams of their own, with their conditions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import small_runs
from linear_gaussian import Linears, complete, labelled_drawn, z_limit, z_scores
from vardistill.diffusion.schedules import VE
from vardistill.objectives import Needs
from vardistill.students.student import Student
from vardistill.training.draws import CHUNKS, Drawn, Draws, stream

CPU = torch.device("cpu")
OWN = small_runs.levels(draws=2, shared=4, stratified=True)
NEEDS = Needs(real=True, eta=2, pool=24, other_levels=(OWN,))


def draws(kind: str = "labels", batch: int = 24, seed: int = 0, **levels: Any) -> Draws:
    student, dtype = small_runs.generator_of(kind), torch.float64
    of_kind = small_runs.levels(kind, stratified=True, **levels)
    return Draws(student, of_kind, small_runs.data(kind), small_runs.conditions(kind), batch, seed, CPU, dtype)


def tensors(drawn: Drawn) -> dict[str, tuple[Tensor, int]]:
    """All of a draw, by name, with the axis of its rows; what has one for each draw of noise has it first."""
    found = {"z": (drawn.z, 0), "renoise": (drawn.renoise, 1)}
    for i, noise in enumerate((drawn.noise, *drawn.other_noise)):
        for name in ("t", "alpha", "sigma", "weight", "eps", "real_eps"):
            v = getattr(noise, name)
            found[f"{name}{i}"] = v.unflatten(0, (-1, noise.latents)), 1
    assert drawn.eta is not None
    assert drawn.pool is not None
    assert drawn.real is not None
    found |= {"eta": (drawn.eta, 2), "real": (drawn.real, 0)}
    found |= {"pool": (drawn.pool[0], 0), "pool's renoise": (drawn.pool[1], 1)}
    return found | {name: (v, 0) for name, v in drawn.condition.items()}


class TestStreams:
    @pytest.mark.parametrize(("kind", "m"), [("labels", 0), ("few-varflow", 0), ("labels", 3)])
    @pytest.mark.parametrize("processes", [2, 3, 4, 6])
    def test_the_rows_of_an_update_are_those_of_any_number_of_processes(
        self, processes: int, kind: str, m: int
    ) -> None:
        """Bit for bit, also where processes share chunks: 24 rows are eight chunks of three."""
        draw, needs = draws(kind), replace(NEEDS, per_condition=m)
        for step in (0, 5):
            whole = draw(needs, 0.3, step, 1, student_step=None)
            shares = [draw(needs, 0.3, step, 1, process, processes) for process in range(processes)]
            assert {share.step for share in shares} == {whole.step}
            parts = [tensors(share) for share in shares]
            for name, (v, axis) in tensors(whole).items():
                assert torch.equal(torch.cat([part[name][0] for part in parts], axis), v), name

    def test_eight_processes_draw_a_chunk_each(self) -> None:
        draw = draws("few-varflow", batch=32)
        needs = replace(NEEDS, pool=32)
        whole = tensors(draw(needs, 0.3, 2, 0))
        parts = [tensors(draw(needs, 0.3, 2, 0, process, CHUNKS)) for process in range(CHUNKS)]
        for name, (v, axis) in whole.items():
            assert torch.equal(torch.cat([part[name][0] for part in parts], axis), v), name

    @pytest.mark.parametrize("batch", [1, 2, 5, 7])
    def test_a_batch_may_be_smaller_than_the_chunks(self, batch: int) -> None:
        """No chunk of none is drawn: user's functions need not know how."""
        drawn = draws(batch=batch)(Needs(real=True), 0.3, 0, 0)
        assert len(drawn.z) == batch
        assert drawn.real is not None
        assert len(drawn.real) == len(drawn.condition["labels"]) == batch

    def test_a_process_draws_no_chunk_without_rows_of_its_own(self) -> None:
        asked = []
        sample = small_runs.teacher().sample

        def watched(n: int, rng: torch.Generator) -> Tensor:
            asked.append(n)
            return sample(n, rng)

        draw = replace(draws("varflow"), data=watched)
        draw(Needs(real=True), 0.3, 0, 0, process=1, processes=4)
        assert asked == [3, 3]
        draw(Needs(), 0.3, 0, 0)
        assert asked == [3, 3]

    def test_other_steps_updates_seeds_and_chunks_draw_other_numbers(self) -> None:
        draw = draws("few-varflow")
        found = [draw(Needs(), 0.3, *place, student_step=2) for place in ((0, 0), (0, 1), (1, 0), (2**20, 0))]
        found.append(draws("few-varflow", seed=1)(Needs(), 0.3, 0, 0, student_step=2))
        for get in (lambda d: d.z, lambda d: d.renoise, lambda d: d.noise.eps, lambda d: d.noise.t):
            rows = torch.cat([get(drawn).flatten() for drawn in found])
            assert len(rows.unique()) >= len(found) * len(get(found[0]).unique())
        z = found[0].z
        assert len(z.unique()) == z.numel()

    def test_a_name_is_four_numbers(self) -> None:
        """Not their sum, nor what they are one after another."""
        names = itertools.product((0, 1, 12), repeat=4)
        first = [float(torch.rand((), generator=stream(*name, CPU))) for name in names]
        assert len(set(first)) == 3**4

    def test_pools_are_none_of_the_batchs_latents(self) -> None:
        drawn = draws("few-varflow")(NEEDS, 0.3, 0, 0)
        assert drawn.pool is not None
        values = torch.cat([drawn.z, drawn.pool[0]]).flatten()
        assert len(values.unique()) == len(values)

    def test_no_generator_but_its_own_is_used(self) -> None:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        draw = draws()
        first = draw(NEEDS, 0.3, 3, 1)
        assert torch.equal(torch.get_rng_state(), before)
        draw(NEEDS, 0.3, 4, 1)
        torch.manual_seed(6)
        again = draws()(NEEDS, 0.3, 3, 1)
        for name, (v, _) in tensors(again).items():
            assert torch.equal(v, tensors(first)[name][0]), name

    def test_every_step_of_the_student_is_drawn_alike(self) -> None:
        """Over 3000 updates; the failure rate is 1e-4 (three comparisons, Bonferroni)."""
        draw = draws("few-varflow", batch=2, shared=1)
        steps = torch.tensor([draw(Needs(), 0.3, n, 0).step for n in range(3000)])
        of_steps = torch.stack([(steps == k).double() for k in (1, 2, 3)], 1)
        assert (z_scores(of_steps, 1 / 3).abs() < z_limit(3)).all()

    def test_levels_do_not_tell_the_step(self) -> None:
        """Both are drawn for all rows; over 3000 updates the mean level is that of all in each step."""
        draw = draws("few-varflow", batch=2, shared=1, draws=1, antithetic=False)
        found = [draw(Needs(), 0.3, n, 0) for n in range(3000)]
        levels = torch.stack([drawn.noise.sigma[0].log() for drawn in found])
        steps = torch.tensor([drawn.step for drawn in found])
        z = torch.stack([z_scores(levels[steps == k] - levels.mean(), 0.0) for k in (1, 2, 3)])
        assert (z.abs() < z_limit(3)).all()

    def test_strata_see_all_rows(self) -> None:
        """One level from each of as many strata as there are rows, over all processes together."""
        draw = draws("diff-instruct", draws=1, antithetic=False)
        levels = torch.cat([draw(Needs(), 0.0, 0, 0, process, 3).noise.sigma for process in range(3)])
        schedule, distribution = draw.levels.schedule, draw.levels.distribution
        edges = distribution(torch.linspace(0, 1, 25, dtype=torch.float64).clamp(1e-7, 1 - 1e-7), 0.0, schedule)
        assert (torch.bucketize(levels.sort().values, edges[1:-1]) == torch.arange(24)).all()


class Shifted(Student):
    """x = z + c."""

    def forward(self, z: Tensor, shift: Tensor) -> Tensor:
        return z + shift


class TestConditions:
    def drawn(self, rng: torch.Generator, **options: Any) -> tuple[Linears, Drawn]:
        generator = small_runs.labelled_generator()
        levels = {"draws": 2, "antithetic": True} | options
        return generator, labelled_drawn(generator, VE(), (0.3, 0.6), 6, rng, data=small_runs.labelled_data, **levels)

    def test_rows_and_candidates_have_the_labels_of_their_latents(self, rng: torch.Generator) -> None:
        generator, drawn = self.drawn(rng)
        draw, labels = complete(drawn, generator), drawn.condition["labels"]
        assert labels.unique().tolist() == [0, 1]
        assert draw.batch["labels"].tolist() == labels.tolist() * 2
        for row in range(12):
            alone = generator.of(int(labels[row % 6]))
            torch.testing.assert_close(draw.x[row], alone(drawn.z[row % 6][None])[0])
        candidates = torch.randn(3, 12, 2, generator=rng, dtype=torch.float64)
        x = draw.generator(candidates.flatten(0, 1)).unflatten(0, (3, 12))
        for k, row in itertools.product(range(3), range(12)):
            alone = generator.of(int(labels[row % 6]))
            torch.testing.assert_close(x[k, row], alone(candidates[k, row][None])[0])

    def test_conditions_may_have_further_axes(self, rng: torch.Generator) -> None:
        """A shift of every sample, (N, 2)."""
        _, drawn = self.drawn(rng)
        shift = torch.randn(6, 2, generator=rng, dtype=torch.float64)
        draw = complete(drawn._replace(condition={"shift": shift}), Shifted())
        torch.testing.assert_close(draw.x, (drawn.z + shift).repeat(2, 1))
        torch.testing.assert_close(draw.generator(torch.zeros(36, 2)), shift.repeat(6, 1))

    @pytest.mark.parametrize("parts", [2, 3])
    def test_parts_of_a_step_keep_them_with_their_rows(self, parts: int, rng: torch.Generator) -> None:
        generator, drawn = self.drawn(rng)
        whole, n = complete(drawn, generator), 6 // parts
        for part in range(parts):
            share = complete(drawn.shard(part, parts), generator)
            rows = torch.arange(12).view(2, 6)[:, part * n : (part + 1) * n].flatten()
            for name in ("z", "x", "x_t", "real_t"):
                assert torch.equal(getattr(share, name), getattr(whole, name)[rows]), name
            assert torch.equal(share.batch["labels"], whole.batch["labels"][rows])
            z = torch.zeros(2 * len(rows), 2, dtype=torch.float64)
            torch.testing.assert_close(share.generator(z), generator.b[whole.batch["labels"][rows]].repeat(2, 1))
