"""How far samples, and bounds, are from what they should be."""

from vardistill.metrics.bound import BoundGap, bound_gap, diffusive_kl
from vardistill.metrics.critic import CriticBias, critic_bias
from vardistill.metrics.density import log_density
from vardistill.metrics.density_coverage import DensityCoverage, density_coverage
from vardistill.metrics.energy_distance import energy_distance
from vardistill.metrics.evaluate import evaluate
from vardistill.metrics.frechet import frechet_distance
from vardistill.metrics.kernel_distance import kernel_distance
from vardistill.metrics.manifolds import ManifoldMetrics, manifold_metrics
from vardistill.metrics.memorisation import Nearest, memorised_share, nearest
from vardistill.metrics.mmd import MMD, log_mmd, mmd2, mmd_statistics, mmd_test
from vardistill.metrics.modes import ModeStatistics, mode_radius, mode_statistics
from vardistill.metrics.precision_recall import PrecisionRecall, precision_recall

__all__ = [
    "MMD",
    "BoundGap",
    "CriticBias",
    "DensityCoverage",
    "ManifoldMetrics",
    "ModeStatistics",
    "Nearest",
    "PrecisionRecall",
    "bound_gap",
    "critic_bias",
    "density_coverage",
    "diffusive_kl",
    "energy_distance",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "log_density",
    "log_mmd",
    "manifold_metrics",
    "memorised_share",
    "mmd2",
    "mmd_statistics",
    "mmd_test",
    "mode_radius",
    "mode_statistics",
    "nearest",
    "precision_recall",
]
