r"""VarDiU: a variational upper bound on the diffusive KL (Wang, Zhang, Ou & Barber 2025, arXiv 2508.20646).

For x = g_θ(z), z ~ p(z) = N(0, I), x_t = α_t x + σ_t ε and any density q_φ(z | x_t, t),

    KL(p_θ^t ‖ p_d^t) ≤ DiU_t = E[ log p(z) + log N(x_t; α_t g_θ(z), σ_t² I) − log q_φ(z | x_t, t) − log p_d^t(x_t) ],

with gap E KL(p_θ(z | x_t) ‖ q_φ(z | x_t, t)). The first two terms are constants, and the teacher enters through its
score s_T = ∇ log p_d^t alone, so the gradient is that of

    ℓ = −w(t)/d [ log q_φ(z | x_t, t) + (s_T(x_t, t) + c(t) ε/σ_t)ᵀ x_t ],

where s_T and c(t) ε/σ_t are held fixed, and the latter has no gradient in the mean, for any c (a control variate). In
nats per dimension of x, as all losses here (`base`); w(t) weights q_φ alike in all of its updates.

**Multi-sample bound.** With z_0 = z, z_1..z_K ~ q_φ(· | x_t, t) and

    ℓ_k = log p(z_k) + log N(x_t; α_t g_θ(z_k), σ_t² I) − log q_φ(z_k | x_t, t),

    DiU_t^K = DiU_t + E log [ 1/(K+1) Σ_{k=0..K} exp(ℓ_k − ℓ_0) ]

is DiU_t at K = 0, never increases with K, and tends to the KL (Sobolev & Vetrov 2019, arXiv 1905.03290).
With q = p the candidates can be the other latents of the batch (`candidates="batch"`). Given the set of candidates,
x_t follows their mixture, so by the score identity the candidates' own gradients at fixed x_t sum to zero in the mean:
they are left out, and the correction's gradient is s_m(x_t) + ε/σ_t, with s_m the score of the mixture
1/(K+1) Σ_k N(x_t; α_t x_k, σ_t² I).

**A chain.** At z_0 a chain in the posterior begins where it already is (`candidates="chain"`, see `chain`): its later
states z_k are exact posterior samples, nearly independent of z_0 where it mixes, and tell the gradient of the exact
posterior's term, −∇ log p_θ(z | x_t) = E[(α_t g_θ(z_k) − x_t)/σ_t²] + ε/σ_t (as in unbiased implicit variational
inference; Titsias & Ruiz 2019, arXiv 1808.02078). There is no network, and no bound to log.

**Several steps.** A student of n steps has a bound for each: the latent is then the step's own input, x_{t_k} brought
to unit variance, whose law does not depend on the step's gradient, and q_φ one density per step. The prior's terms are
constants that are not known for k > 1, so there the loss is a bound up to a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from vardistill import diffusion, posteriors
from vardistill.choices import ActivationName, check_choices
from vardistill.errors import UsageError, require, unknown
from vardistill.lazy import Later
from vardistill.objectives.base import STUDENT, Needs, Objective, Parts, Update, inner

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vardistill import processes
    from vardistill.denoisers import mixture
    from vardistill.diffusion import Denoiser, Draw
    from vardistill.objectives import chain, diagnostics
    from vardistill.posteriors import Conditional, Posterior, Reparameterised
    from vardistill.students import Student
else:
    torch, nn = Later("torch"), Later("torch.nn")
    processes, mixture = Later("vardistill.processes"), Later("vardistill.denoisers.mixture")
    chain, diagnostics = Later("vardistill.objectives.chain"), Later("vardistill.objectives.diagnostics")

PosteriorName = Literal["prior", "diagonal", "low-rank", "full", "mixture", "nsf", "coupling"]
"""Families of q(z | x_t); a domain has some of them."""


@dataclass(frozen=True)
class VarDiUConfig:
    """VarDiU.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "vardiu"
    cost: ClassVar[int] = 2
    posterior: PosteriorName = "prior"
    """Family of q(z | x_t). Points have prior, diagonal, full, mixture and nsf; pictures prior, diagonal, low-rank and
    coupling."""
    candidates: int | Literal["batch", "chain"] = 0
    """K of the multi-sample bound: latents drawn from q, or with posterior prior the batch's others; or the states of a
    chain."""
    chain_length: int = 8
    """Steps of the chain."""
    chain_rate: float = 0.3
    """γ, their size."""
    pool: int = 0
    """Further latents from the prior beside the batch's, as candidates without gradient."""
    control_variate: Literal["zero", "one", "gaussian"] = "one"
    """c(t) of the teacher's term: 0, 1, or r²/(r² + σ_d²) at the noise-to-signal ratio r = σ/α."""
    posterior_steps: int = 1
    """Posterior updates per generator update."""
    posterior_depth: int = 4
    """Hidden layers of the posterior's network, of points."""
    posterior_width: int | None = None
    """Units of its hidden layers, or channels; default 256 units for points, 32 channels for pictures."""
    posterior_activation: ActivationName = "silu"
    """Its activation function, of points."""
    posterior_rank: int = 8
    """Directions in which a low-rank Gaussian carries correlations, beside its diagonal."""

    def __post_init__(self) -> None:
        check_choices(self)
        known = self.candidates in ("batch", "chain") or int(self.candidates) >= 0
        require("candidates", self.candidates, known, "'batch', 'chain' or at least 0")
        require("chain_rate", self.chain_rate, 0 < self.chain_rate < math.inf, "positive and finite")
        require("pool", self.pool, self.pool >= 0, "0 or positive")
        for name in ("posterior_steps", "posterior_depth", "posterior_rank", "chain_length"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        width = self.posterior_width
        require("posterior_width", width, width is None or width >= 1, "at least 1")

    def build(self, parts: Parts) -> VarDiU:
        """The objective with untrained posteriors, one per step of the student."""
        assert parts.teacher is not None
        q: list[Posterior] = [posteriors.Prior()]
        if self.posterior != "prior":
            q = parts.posterior(
                self.posterior,
                depth=self.posterior_depth,
                width=self.posterior_width,
                activation=self.posterior_activation,
                rank=self.posterior_rank,
            )
        return VarDiU(
            parts.teacher,
            q,
            candidates=self.candidates,
            control_variate=self.control_variate,
            sigma_data=parts.data_std,
            posterior_steps=self.posterior_steps,
            pool=self.pool,
            chain_length=self.chain_length,
            chain_rate=self.chain_rate,
        )


ControlVariate = Callable[["Tensor"], "Tensor"]
"""c from the ratio σ_t/α_t, both (R,)."""


def control_variates(sigma_data: float) -> dict[str, ControlVariate]:
    """The named c(t), with r = σ_t/α_t.

    With a posterior near the exact one −∇ log q_φ holds ε/σ_t, which `one` (the reference's) cancels at every level.
    The teacher's term alone is quietest with `gaussian`, r²/(r² + σ_d²), on Gaussian data of standard deviation σ_d:
    the choice where the posterior sees little. `zero` is 0.
    """
    return {
        "zero": lambda ratio: torch.zeros_like(ratio),
        "one": lambda ratio: torch.ones_like(ratio),
        "gaussian": lambda ratio: ratio**2 / (ratio**2 + sigma_data**2),
    }


class VarDiU(Objective):
    """The single- and multi-sample VarDiU objective.

    Args:
        teacher: E[x | x_t]; where it has `log_prob`, the bound is logged in nats.
        posterior: q_φ(z | x_t, t); of a student of n steps a sequence of n, or the prior.
        candidates: K, further latents drawn from q_φ per row; "batch": the batch's other latents, with q = p; or
            "chain": the states of a chain in the exact posterior.
        control_variate: name of c(t), see `control_variates`.
        sigma_data: σ_d of the `gaussian` control variate.
        posterior_steps: updates of q_φ per update of the generator, the joint one included.
        pool: M, further latents from the prior beside the batch's, without gradient: a tighter bound for a
            generator's forward pass.
        chain_length: of the chain, the later half of which counts.
        chain_rate: γ, their size.

    Raises:
        UsageError: for "batch" or "chain" candidates with a posterior that is not the prior, drawn candidates from a
            posterior without reparameterised draws, posterior steps for one without parameters, an unknown control
            variate, or a chain's numbers out of their range.
    """

    teacher: Denoiser
    scores_by_teacher: ClassVar[bool] = True

    def __init__(
        self,
        teacher: Denoiser,
        posterior: Posterior | Sequence[Posterior],
        candidates: int | Literal["batch", "chain"] = 0,
        control_variate: str = "one",
        sigma_data: float = 1.0,
        posterior_steps: int = 1,
        pool: int = 0,
        chain_length: int = 8,
        chain_rate: float = 0.3,
    ) -> None:
        known = control_variates(sigma_data)
        if control_variate not in known:
            raise unknown("control variate", control_variate, known)
        self.posteriors = tuple(posterior) if isinstance(posterior, Sequence) else (posterior,)
        first, *others = self.posteriors
        self.learned = not isinstance(first, posteriors.Prior)
        name = type(first).__name__
        if candidates == "batch" and self.learned:
            raise UsageError(f"candidates shared across the batch come from the prior, but the posterior is {name}")
        if candidates == "chain" and self.learned:
            raise UsageError(f"a chain takes the place of a posterior, but there is {name}: leave it out")
        if candidates not in ("batch", "chain") and not (isinstance(candidates, int) and candidates >= 0):
            raise UsageError(f"candidates must be 0, positive, 'batch' or 'chain', but is {candidates}")
        require("chain_length", chain_length, isinstance(chain_length, int) and chain_length >= 1, "at least 1")
        require("chain_rate", chain_rate, 0 < chain_rate < math.inf, "positive and finite")
        if candidates not in (0, "batch", "chain") and not first.reparameterised:
            raise UsageError(f"{name} has no reparameterised draws: use candidates=0 or another posterior")
        if pool < 0 or (pool and candidates != "batch"):
            raise UsageError(f"pool must be 0, or positive with candidates='batch', but is {pool} with {candidates!r}")
        if posterior_steps < 1 or (posterior_steps > 1 and not self.learned):
            raise UsageError(
                f"posterior_steps must be at least 1, and 1 for the prior, but is {posterior_steps} for {name}"
            )
        networks = {"posterior": nn.ModuleList(self.posteriors) if others else first} if self.learned else {}
        super().__init__(teacher, networks)
        self.candidates, self.pool, self.posterior_steps = candidates, pool, posterior_steps
        self.chain_length, self.chain_rate = chain_length, chain_rate
        self.control_variate, self.sigma_data, self.c = control_variate, sigma_data, known[control_variate]

    @property
    def needs(self) -> Needs:
        """The candidates, or a chain's noise."""
        eta = self.candidates if isinstance(self.candidates, int) else 0
        if self.candidates == "chain":
            eta = 2 * self.chain_length
        return Needs(eta=eta, pool=self.pool, smallest_batch=2 if self.candidates == "batch" else 1)

    def updates(self, progress: float = 0.0) -> list[Update]:
        """Of q_φ alone, posterior_steps − 1 times, and of both from one backward pass."""
        joint = Update(
            STUDENT,
            (STUDENT, *self.networks),
            self.generator_loss,
            self.needs,
            couples_rows=self.candidates == "batch",
            evaluations=self.evaluations,
        )
        if self.posterior_steps == 1:
            return [joint]
        own = Update(
            "posterior",
            ("posterior",),
            self.posterior_loss,
            Needs(eta=self.needs.eta),
            repeats=self.posterior_steps - 1,
            evaluations=self._latent_evaluations,
        )
        return [own, joint]

    def check(self, student: Student, condition: Mapping[str, Tensor]) -> None:
        """Raise UsageError unless teacher and posteriors take the student's samples and latents."""
        super().check(student, condition)
        if self.candidates == "batch" and condition:
            raise UsageError(
                "candidates of the batch have other conditions: use candidates=0 or K with a conditional student"
            )
        if self.learned and len(self.posteriors) != student.steps:
            raise UsageError(
                f"a student of {student.steps} steps needs as many posteriors, one for each, but there are "
                f"{len(self.posteriors)}"
            )
        if self.needs.eta and student.steps > 1:
            raise UsageError(
                "candidates drawn from a posterior, and chains, need the latents' prior density, which a student of "
                "several steps does not know: use candidates=0 or 'batch'"
            )
        for posterior in self.posteriors:
            posteriors.check_posterior(posterior, student, condition)

    def generator_loss(self, draw: Draw) -> Tensor:
        """w(t)/d times the integrand of the bound, up to constants and the value of log p_d^t, (R,)."""
        noise, x_t = draw.noise, draw.x_t
        with torch.no_grad():
            ratio = self.c(noise.sigma / noise.alpha) / noise.sigma
            s_t = draw.score(self.teacher) + diffusion.expand(ratio, x_t) * noise.eps
        return noise.weight * (self._latent_terms(draw, x_t) / dimension(x_t) - inner(s_t, x_t))

    def posterior_loss(self, draw: Draw) -> Tensor:
        """w(t)/d times the terms of the bound that depend on φ, (R,).

        Where candidates are drawn from q_φ the gradient passes through the generator; only φ's part is to be used.
        """
        x_t = draw.x_t.detach()
        return draw.noise.weight * self._latent_terms(draw, x_t) / dimension(x_t)

    def bound(self, draw: Draw) -> Tensor:
        """The integrand of DiU_t^K in nats, (R,); its mean exceeds the diffusive KL.

        Raises:
            UsageError: for a teacher without a density, or a chain.
        """
        if self.candidates == "chain":
            raise UsageError("a chain gives the gradient of a bound, but not its value")
        if not isinstance(self.teacher, diffusion.DensityDenoiser):
            raise UsageError(
                f"the bound's value needs a teacher with log_prob, but {type(self.teacher).__name__} has none"
            )
        log_prior = posteriors.standard_normal(draw.z.flatten(1))
        log_noise = posteriors.standard_normal(draw.noise.eps.flatten(1)) - dimension(draw.x) * draw.noise.sigma.log()
        log_teacher = self.teacher.log_prob(draw.x_t, draw.noise.t, **draw.batch)
        return log_prior + log_noise + self._latent_terms(draw, draw.x_t) - log_teacher

    @property
    def has_bound(self) -> bool:
        """Whether `bound` has a value, up to what is not known of a later step's latents."""
        return self.candidates != "chain" and isinstance(self.teacher, diffusion.DensityDenoiser)

    def evaluations(self, latents: int, draws: int) -> int:
        """The posterior, the generator at drawn candidates, teacher and pool."""
        return self._latent_evaluations(latents, draws) + latents * draws + self.pool

    def _latent_evaluations(self, latents: int, draws: int) -> int:
        if self.candidates == "chain":
            return latents * draws * (self.chain_length + 1)
        return latents * draws * (int(self.learned) + self.needs.eta)

    def measure(self, draw: Draw) -> dict[str, Tensor]:
        """In nats: the bound, where its constants are known, and the information of a posterior that is learned."""
        known = self.has_bound and (draw.step == 1 or not self.learned)
        with torch.no_grad():
            bound = {"bound": self.bound(draw).mean()} if known else {}
            told = self.learned and draw.step == 1  # the prior of later steps' latents is not known
            return bound | diagnostics.posterior_information(self.of_step(draw), draw) if told else bound

    def of_step(self, draw: Draw) -> Posterior:
        """q_φ of the student's step that made the draw."""
        return self.posteriors[draw.step - 1 if self.learned else 0]

    def _latent_terms(self, draw: Draw, x_t: Tensor) -> Tensor:
        """−log q_φ(z | x_t, t) + log 1/(K+1) Σ_k exp(ℓ_k − ℓ_0), (R,)."""
        q: Conditional = self.of_step(draw)(x_t, draw.noise.alpha, draw.noise.sigma, **draw.batch)
        log_q = q.log_prob(draw.z.flatten(1))
        if self.candidates == "batch":
            return shared_correction(draw, x_t, self.pool) - log_q
        if self.candidates == "chain":
            return self._chain_correction(draw, x_t) - log_q
        if self.candidates:
            return self._drawn_correction(draw, x_t, q, log_q) - log_q
        return -log_q

    def _chain_correction(self, draw: Draw, x_t: Tensor) -> Tensor:
        """0 with the gradient of the exact posterior's term in x_t, s_θ(x_t) + ε/σ, (R,)."""
        score = chain.chain_score(draw, self.chain_length, self.chain_rate, self.sigma_data)
        gradient = score + draw.noise.eps / diffusion.expand(draw.noise.sigma, x_t)
        return (gradient * (x_t - x_t.detach())).flatten(1).sum(1)

    def _drawn_correction(self, draw: Draw, x_t: Tensor, q: Conditional, log_q: Tensor) -> Tensor:
        """log 1/(K+1) Σ_k exp(ℓ_k − ℓ_0) with candidates from q_φ, (R,)."""
        if draw.eta is None:
            raise UsageError(
                f"the bound with {self.candidates} candidates needs draw.eta, ({self.candidates}, R, latent)"
            )
        z = cast("Reparameterised", q).transport(draw.eta[: self.needs.eta].flatten(2))
        x = draw.generator(z.view(-1, *draw.z.shape[1:])).unflatten(0, z.shape[:2])
        alpha, sigma = diffusion.expand(draw.noise.alpha, x_t), diffusion.expand(draw.noise.sigma, x_t)
        eps = (x_t - alpha * x) / sigma
        log_w = posteriors.standard_normal(z.flatten(2)) + posteriors.standard_normal(eps.flatten(2)) - q.log_prob(z)
        log_w_0 = (
            posteriors.standard_normal(draw.z.flatten(1))
            + posteriors.standard_normal(draw.noise.eps.flatten(1))
            - log_q
        )
        log_w = torch.cat([log_w_0[None], log_w])
        return log_w.logsumexp(0) - math.log(len(log_w)) - log_w_0


def shared_correction(draw: Draw, x_t: Tensor, pool: int = 0) -> Tensor:
    """log 1/(K+1) Σ_k N(x_t; α x_k, σ² I)/N(x_t; α x, σ² I) over the batch's latents, each once, and the pool's, (R,).

    Its value is differentiable in x_t with the gradient s_m(x_t) + ε/σ, computed without autograd.
    """
    noise = draw.noise
    with torch.no_grad():
        candidates = draw.x[: noise.latents]
        if pool and draw.pool is None:
            raise UsageError(f"the bound with a pool of {pool} needs draw.pool, ({pool}, *latent)")
        if pool and draw.pool is not None:
            candidates = torch.cat([candidates, draw.generator(draw.pool)])
        candidates = processes.gather(candidates.flatten(1))
        log_sum, denoised = mixture.mixture_of_points(x_t.flatten(1), candidates, noise.alpha, noise.sigma)
        alpha, sigma = diffusion.expand(noise.alpha, x_t), diffusion.expand(noise.sigma, x_t)
        gradient = (alpha * denoised.view_as(x_t) - x_t) / sigma**2 + noise.eps / sigma
        log_own = -0.5 * noise.eps.flatten(1).pow(2).sum(1)
        value = log_sum - math.log(len(candidates)) - log_own
    return value + (gradient * (x_t - x_t.detach())).flatten(1).sum(1)


def dimension(x: Tensor) -> int:
    """d, the number of values of a row."""
    return x[0].numel()
