"""How far samples, and bounds, are from what they should be."""

from vardistill.metrics.bound import BoundGap, bound_gap, diffusive_kl
from vardistill.metrics.critic import CriticBias, critic_bias
from vardistill.metrics.density import log_density, log_density_gap
from vardistill.metrics.energy_distance import energy_distance
from vardistill.metrics.evaluate import evaluate
from vardistill.metrics.mmd import MMD, log_mmd, mmd2, mmd_statistics, mmd_test
from vardistill.metrics.modes import ModeStatistics, mode_radius, mode_statistics
from vardistill.metrics.precision_recall import PrecisionRecall, precision_recall

__all__ = [
    "MMD",
    "BoundGap",
    "CriticBias",
    "ModeStatistics",
    "PrecisionRecall",
    "bound_gap",
    "critic_bias",
    "diffusive_kl",
    "energy_distance",
    "evaluate",
    "log_density",
    "log_density_gap",
    "log_mmd",
    "mmd2",
    "mmd_statistics",
    "mmd_test",
    "mode_radius",
    "mode_statistics",
    "precision_recall",
]
