r"""VarDiU: a variational upper bound on the diffusive KL (Wang, Zhang, Ou & Barber 2025, arXiv 2508.20646).

For x = g_θ(z), z ~ p(z) = N(0, I), x_t = α_t x + σ_t ε and any density q_φ(z | x_t, t),

    KL(p_θ^t ‖ p_d^t) ≤ DiU_t = E[ log p(z) + log N(x_t; α_t g_θ(z), σ_t² I) − log q_φ(z | x_t, t) − log p_d^t(x_t) ],

with gap E KL(p_θ(z | x_t) ‖ q_φ(z | x_t, t)). The first two terms are constants, and the teacher enters through its
score s_T = ∇ log p_d^t alone, so the gradient is that of

    ℓ = −w(t) [ log q_φ(z | x_t, t) + ⟨sg(s_T(x_t, t) + c(t) ε/σ_t), x_t⟩ ],

where c(t) ε/σ_t has no gradient in the mean, for any c (a control variate).

**Multi-sample bound.** With z_0 = z, z_1..z_K ~ q_φ(· | x_t, t) and

    ℓ_k = log p(z_k) + log N(x_t; α_t g_θ(z_k), σ_t² I) − log q_φ(z_k | x_t, t),

    DiU_t^K = DiU_t + E log [ 1/(K+1) Σ_{k=0..K} exp(ℓ_k − ℓ_0) ]

is DiU_t at K = 0, never increases with K, and tends to the KL (Sobolev & Vetrov 2019, arXiv 1905.03290).
With q = p the candidates can be the other latents of the batch (`candidates="batch"`). Given the set of candidates,
x_t follows their mixture, so by the score identity the candidates' own gradients at fixed x_t sum to zero in the mean:
they are left out, and the correction's gradient is s_m(x_t) + ε/σ_t, with s_m the score of the mixture
1/(K+1) Σ_k N(x_t; α_t x_k, σ_t² I).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor

from vardistill.denoisers.mixture import mixture_of_points
from vardistill.diffusion.denoiser import Denoiser, DensityDenoiser, score
from vardistill.diffusion.noise import Draw
from vardistill.diffusion.schedules import expand
from vardistill.errors import UsageError, unknown
from vardistill.objectives.base import Objective, inner
from vardistill.objectives.diagnostics import posterior_information
from vardistill.posteriors.few import Conditional, Posterior, Prior, Reparameterised, check_posterior, standard_normal
from vardistill.processes import gather
from vardistill.students.student import Student
from vardistill.training.data import Conditions

ControlVariate = Callable[[Tensor], Tensor]
"""c from the ratio σ_t/α_t, both (R,)."""


def control_variates(sigma_data: float) -> dict[str, ControlVariate]:
    """The named c(t), with r = σ_t/α_t.

    With a posterior near the exact one −∇ log q_φ holds ε/σ_t, which `one` (the reference's) cancels at every level.
    The teacher's term alone is quietest with `gaussian`, r²/(r² + σ_d²), on Gaussian data of standard deviation σ_d:
    the choice where the posterior sees little. `zero` is 0.
    """
    return {
        "zero": torch.zeros_like,
        "one": torch.ones_like,
        "gaussian": lambda ratio: ratio**2 / (ratio**2 + sigma_data**2),
    }


class VarDiU(Objective):
    """The single- and multi-sample VarDiU objective.

    Args:
        teacher: E[x | x_t]; where it has `log_prob`, the bound is logged in nats.
        posterior: q_φ(z | x_t, t).
        candidates: K, further latents drawn from q_φ per row; or "batch": the batch's other latents, with q = p.
        control_variate: name of c(t), see `control_variates`.
        sigma_data: σ_d of the `gaussian` control variate.
        posterior_steps: updates of q_φ per update of the generator, the joint one included.
        pool: M, further latents from the prior beside the batch's, without gradient: a tighter bound for a
            generator's forward pass.

    Raises:
        UsageError: for "batch" candidates with a posterior that is not the prior, drawn candidates from a posterior
            without reparameterised draws, posterior steps for one without parameters, or an unknown control variate.
    """

    teacher: Denoiser

    def __init__(
        self,
        teacher: Denoiser,
        posterior: Posterior,
        candidates: int | Literal["batch"] = 0,
        control_variate: str = "one",
        sigma_data: float = 1.0,
        posterior_steps: int = 1,
        pool: int = 0,
    ) -> None:
        super().__init__(teacher)
        known = control_variates(sigma_data)
        if control_variate not in known:
            raise unknown("control variate", control_variate, known)
        name = type(posterior).__name__
        if candidates == "batch" and not isinstance(posterior, Prior):
            raise UsageError(f"candidates shared across the batch come from the prior, but the posterior is {name}")
        if candidates != "batch" and not (isinstance(candidates, int) and candidates >= 0):
            raise UsageError(f"candidates must be 0, positive or 'batch', but is {candidates}")
        if candidates not in (0, "batch") and not posterior.reparameterised:
            raise UsageError(f"{name} has no reparameterised draws: use candidates=0 or another posterior")
        if pool < 0 or (pool and candidates != "batch"):
            raise UsageError(f"pool must be 0, or positive with candidates='batch', but is {pool} with {candidates!r}")
        if posterior_steps < 1 or (posterior_steps > 1 and isinstance(posterior, Prior)):
            raise UsageError(
                f"posterior_steps must be at least 1, and 1 for the prior, but is {posterior_steps} for {name}"
            )
        self.posterior = posterior
        self.candidates = candidates
        self.control_variate = known[control_variate]
        self.pool_latents = pool
        self.critic_steps = posterior_steps - 1
        self.fresh_latents = candidates if isinstance(candidates, int) else 0
        self.smallest_batch = 2 if candidates == "batch" else 1

    def check(self, generator: Student, conditions: Conditions | None = None) -> None:
        """Raise UsageError unless teacher and posterior take the generator's samples and latents."""
        super().check(generator, conditions)
        check_posterior(self.posterior, generator, conditions)

    def generator_loss(self, draw: Draw) -> Tensor:
        """w(t) times the integrand of the bound, up to constants and the value of log p_d^t, (R,)."""
        noise, x_t = draw.noise, draw.x_t
        with torch.no_grad():
            s_t = score(self.teacher, x_t, noise.t, **draw.batch)
            s_t += expand(self.control_variate(noise.sigma / noise.alpha) / noise.sigma, x_t) * noise.eps
        return noise.weight * (self._latent_terms(draw, x_t) - inner(s_t, x_t))

    def critic_loss(self, draw: Draw) -> Tensor:
        """The terms of the bound that depend on φ, (R,): unweighted, since one q_φ is best at every level at once.

        Where candidates are drawn from q_φ the gradient passes through the generator; only φ's part is to be used.
        """
        return self._latent_terms(draw, draw.x_t.detach())

    def bound(self, draw: Draw) -> Tensor:
        """The integrand of DiU_t^K in nats, (R,); its mean exceeds the diffusive KL.

        Raises:
            UsageError: for a teacher without a density.
        """
        if not isinstance(self.teacher, DensityDenoiser):
            raise UsageError(
                f"the bound's value needs a teacher with log_prob, but {type(self.teacher).__name__} has none"
            )
        log_prior = standard_normal(draw.z.flatten(1))
        log_noise = standard_normal(draw.noise.eps.flatten(1)) - draw.x[0].numel() * draw.noise.sigma.log()
        log_teacher = self.teacher.log_prob(draw.x_t, draw.noise.t, **draw.batch)
        return log_prior + log_noise + self._latent_terms(draw, draw.x_t) - log_teacher

    def evaluations(self, latents: int, draws: int, critic: bool) -> int:
        """The posterior, the generator at drawn candidates; in the generator's update teacher and pool, too."""
        rows = latents * draws
        posterior = 0 if isinstance(self.posterior, Prior) else rows
        latent_terms = posterior + self.fresh_latents * rows
        return latent_terms if critic else latent_terms + rows + self.pool_latents

    @torch.no_grad()
    def diagnostics(self, draw: Draw) -> dict[str, Tensor]:
        """In nats: the bound, where the teacher has a density, and the information of a posterior that is learned."""
        bound = {"bound": self.bound(draw).mean()} if isinstance(self.teacher, DensityDenoiser) else {}
        return bound if isinstance(self.posterior, Prior) else bound | posterior_information(self.posterior, draw)

    def _latent_terms(self, draw: Draw, x_t: Tensor) -> Tensor:
        """−log q_φ(z | x_t, t) + log 1/(K+1) Σ_k exp(ℓ_k − ℓ_0), (R,)."""
        q: Conditional = self.posterior(x_t, draw.noise.alpha, draw.noise.sigma, **draw.batch)
        log_q = q.log_prob(draw.z.flatten(1))
        if self.candidates == "batch":
            return shared_correction(draw, x_t, self.pool_latents) - log_q
        if self.candidates:
            return self._drawn_correction(draw, x_t, q, log_q) - log_q
        return -log_q

    def _drawn_correction(self, draw: Draw, x_t: Tensor, q: Conditional, log_q: Tensor) -> Tensor:
        """log 1/(K+1) Σ_k exp(ℓ_k − ℓ_0) with candidates from q_φ, (R,)."""
        if draw.eta is None:
            raise UsageError(
                f"the bound with {self.candidates} candidates needs draw.eta, ({self.candidates}, R, latent)"
            )
        z = cast(Reparameterised, q).transport(draw.eta[: self.fresh_latents].flatten(2))
        x = draw.generator(z.view(-1, *draw.z.shape[1:])).unflatten(0, z.shape[:2])
        alpha, sigma = expand(draw.noise.alpha, x_t), expand(draw.noise.sigma, x_t)
        eps = (x_t - alpha * x) / sigma
        log_w = standard_normal(z.flatten(2)) + standard_normal(eps.flatten(2)) - q.log_prob(z)
        log_w_0 = standard_normal(draw.z.flatten(1)) + standard_normal(draw.noise.eps.flatten(1)) - log_q
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
        candidates = gather(candidates.flatten(1))
        log_sum, denoised = mixture_of_points(x_t.flatten(1), candidates, noise.alpha, noise.sigma)
        alpha, sigma = expand(noise.alpha, x_t), expand(noise.sigma, x_t)
        gradient = (alpha * denoised.view_as(x_t) - x_t) / sigma**2 + noise.eps / sigma
        log_own = -0.5 * noise.eps.flatten(1).pow(2).sum(1)
        value = log_sum - math.log(len(candidates)) - log_own
    return value + inner(gradient, x_t - x_t.detach())
