r"""Teachers from the diffusers library: E[x | x_t] from a network and the scheduler that it was trained with.

A diffusers scheduler fixes three things, and the sampler it also holds does not matter here:

    family     schedule                      network's time      network's prediction
    discrete   Table(ᾱ_0, ..., ᾱ_{T−1})      (T − 1) t           epsilon, v or x
    EDM        VE(σ_min, σ_max)              ¼ ln σ              F in EDM's preconditioning (arXiv 2206.00364, eq. 7)
    flow       Rectified()                   T t                 velocity ε − x

Between the integers that a network was trained on it is called with a fractional time. Nothing is clipped or
thresholded, whatever the scheduler's configuration says: E[x | x_t] is the mean. diffusers is imported when it is
first needed.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vardistill.denoisers.module import FromModule
from vardistill.denoisers.network import Preconditioned
from vardistill.diffusion.schedules import VE, Rectified, Schedule, Table
from vardistill.errors import UsageError, require
from vardistill.files import check_hub_id, reason
from vardistill.hub import require_answer
from vardistill.networks import own_precision

NETWORKS = {
    "DiTTransformer2DModel": "hidden_states",
    "SD3Transformer2DModel": "hidden_states",
    "UNet2DConditionModel": "sample",
    "UNet2DModel": "sample",
}
"""The supported networks, and what they call their input x_t."""

DISCRETE = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")

WEIGHTS = "diffusion_pytorch_model"
"""What diffusers calls the files of a network's weights."""

AUTOENCODERS = ("vae", "vqvae", "movq")
"""What pipelines call the component that their network's x are latents of."""

PICTURE_CHANNELS = (1, 3)
"""Of grey and of coloured pictures."""

Network = Callable[..., Tensor]
"""(x, time, labels=None, **condition) → prediction, shape of x."""


class DiffusersDenoiser(nn.Module):
    """A diffusers network and scheduler as a denoiser.

    The network is always in evaluation mode: in training some are random (DiT drops labels, from the global generator).

    Args:
        network: of a class named in `NETWORKS`.
        scheduler: of a class named in `DISCRETE`, `EDM` or `FLOW`; only its forward process is used.
        classes: how many of the network's labels, the first ones, are classes; default all but DiT's for no class.
        latents: whether x are an autoencoder's latents; those of neither one channel nor three always are.

    Attributes:
        network: as given.
        scheduler: as given.
        schedule: the forward process; times are in [0, 1].
        data_shape: (C, H, W) of one x, in the network's space (latents for a latent diffusion model).
        classes: how many classes there are; 0 for none.
        classes_given: whether they were given, rather than taken from the network's configuration.
        null_label: the label that stands for no class, the one after the classes; None where there is none.
        latents: whether x are latents, which no pipeline may clip to the range of pictures.

    Raises:
        UsageError: for other networks or schedulers, and for configurations that do not determine E[x | x_t].
    """

    def __init__(self, network: nn.Module, scheduler: Any, classes: int | None = None, latents: bool = False) -> None:
        super().__init__()
        self._input = NETWORKS[network_name(network)]
        self.network = network
        self.scheduler = scheduler
        self.data_shape = data_shape(network)
        config: Any = network.config
        if config.get("time_embedding_type") == "learned":
            raise UsageError(
                "the network embeds its times by a table (time_embedding_type 'learned'), which has nothing between "
                "its steps: give one of 'positional' or 'fourier'"
            )
        self.latents = latents or self.data_shape[0] not in PICTURE_CHANNELS
        known, labels = known_labels(network)
        self.classes, self.classes_given = (known, False) if classes is None else (classes, True)
        if not (0 < self.classes <= labels or self.classes == labels == 0):
            raise UsageError(f"the network takes {labels} labels, but {self.classes} classes were asked for")
        self.null_label = self.classes if self.classes < labels else None
        self._denoise = parametrised(self._predict, scheduler)
        self.schedule: Schedule = self._denoise.schedule
        self.eval()

    def train(self, mode: bool = True) -> DiffusersDenoiser:
        """Set the mode, but for the network's."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, **condition: Tensor) -> Tensor:
        """E[x | x_t] for x_t (B, C, H, W), t (B,) and labels (B,) int64; shape of x_t.

        Args:
            x_t: noisy data.
            t: times in [0, 1].
            labels: classes, for a network that takes them.
            condition: further tensors for the network under its own names, such as `encoder_hidden_states`.

        Raises:
            UsageError: for labels that the network does not take, or lacks.
        """
        if labels is None and self.classes:
            raise UsageError(f"the network is conditional on {self.classes} classes: give labels, (B,) of int64")
        if labels is not None:
            if not self.classes:
                raise UsageError("the network has no classes, but labels were given")
            condition["class_labels"] = labels
        x: Tensor = self._denoise(x_t, t, **condition)
        return x

    def loss_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """Of the squared error of what the network predicts, (R,)."""
        return self._denoise.loss_weight(alpha, sigma)

    def init_scale(self, t: float) -> float:
        """The standard deviation of the noise from which a diffusers pipeline would start at time t.

        1 where the variance is preserved (discrete schedulers), σ_t for EDM and rectified flow.
        """
        if isinstance(self.schedule, Table):
            return 1.0
        return float(self.schedule(torch.tensor(t, dtype=torch.float64))[1])

    def _predict(self, x: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
        """The network's prediction, without the variance that some networks return in further channels."""
        with own_precision(self.network, x.device):
            output = self.network(**{self._input: x}, timestep=time, return_dict=False, **condition)
        prediction: Tensor = output[0][:, : x.shape[1]]
        return prediction


def network_name(network: nn.Module) -> str:
    """The name in `NETWORKS` of the network's class or the nearest base class; raises UsageError for others."""
    for base in type(network).__mro__:
        if base.__name__ in NETWORKS:
            return base.__name__
    raise unsupported_network(type(network).__name__)


def unsupported_network(name: str) -> UsageError:
    """An error for a network's class that is not in `NETWORKS`."""
    if name.startswith("Flux"):
        return UsageError(
            f"{name} takes packed latents and its own position ids: wrap a function that packs them by "
            "from_module(function, Rectified(), predicts='velocity'); Flux takes t in [0, 1] as its time"
        )
    return UsageError(f"network {name} is not supported: give one of {', '.join(sorted(NETWORKS))}")


def data_shape(network: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) from the network's configuration; raises UsageError where it does not tell."""
    config: Any = network.config
    channels, size = config.in_channels, config.sample_size
    if size is None:
        raise UsageError(f"the configuration of {type(network).__name__} has no sample_size: set it to H or (H, W)")
    if (config.out_channels or channels) not in (channels, 2 * channels):
        raise UsageError(
            f"the network must return as many channels as it takes, or twice as many with a learned variance, but "
            f"takes {channels} and returns {config.out_channels}"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def known_labels(network: nn.Module) -> tuple[int, int]:
    """How many classes the network is known to have, and how many labels it takes; 0 for none."""
    config: Any = network.config
    if network_name(network) == "DiTTransformer2DModel":
        return int(config.num_embeds_ada_norm), int(config.num_embeds_ada_norm) + 1
    if config.get("class_embed_type") is not None:
        raise UsageError(f"class_embed_type '{config.class_embed_type}' is not supported: only tables of classes are")
    labels = int(config.get("num_class_embeds") or 0)
    return labels, labels


def parametrised(network: Network, scheduler: Any) -> FromModule | Preconditioned:
    """E[x | x_t] of `network` in the scheduler's family; raises UsageError for a scheduler of none."""
    name = type(scheduler).__name__
    for family, build in ((DISCRETE, discrete), (EDM, edm), (FLOW, flow)):
        if name in family:
            return build(network, scheduler)
    raise unsupported_scheduler(name)


def unsupported_scheduler(name: str) -> UsageError:
    """An error for a scheduler's class of no known family."""
    return UsageError(f"scheduler {name} is not supported: give one of {', '.join((*DISCRETE, *EDM, *FLOW))}")


def prediction_type(scheduler: Any, names: dict[str, str]) -> str:
    """The scheduler's prediction_type in this library's `names`."""
    given = scheduler.config.prediction_type
    if given not in names:
        raise UsageError(f"prediction_type '{given}' is not supported here: it must be one of {', '.join(names)}")
    return names[given]


def discrete(network: Network, scheduler: Any) -> FromModule:
    """DDPM and its relatives: ᾱ_i at integer times i, of which the network takes (T − 1) t."""
    predicts = prediction_type(scheduler, {"epsilon": "epsilon", "v_prediction": "v", "sample": "x"})
    values = scheduler.alphas_cumprod.tolist()
    if scheduler.config.get("rescale_betas_zero_snr"):
        values[-1] = 0.0  # where some schedulers put 2⁻²⁴, which may be above the entry before it
    if predicts == "epsilon" and values[-1] == 0:
        raise UsageError(
            "with zero terminal SNR the noise says nothing of x at the last step, so epsilon prediction does not give "
            "E[x | x_t] there: use a network of v_prediction, or rescale_betas_zero_snr=False if it was trained without"
        )
    if scheduler.config.get("timestep_type", "discrete") != "discrete":
        raise UsageError("timestep_type 'continuous' is not supported: give an EDM scheduler if the network is EDM's")
    last = len(values) - 1
    return FromModule(network, Table(tuple(values)), predicts, time=lambda t: last * t)


def edm(network: Network, scheduler: Any) -> Preconditioned:
    """EDM's preconditioning; v_prediction is its negative c_out, that is −F."""
    config = scheduler.config
    predicts = prediction_type(scheduler, {"epsilon": "F", "v_prediction": "-F"})
    schedule = VE(config.sigma_min, config.sigma_max)
    return Preconditioned(network if predicts == "F" else Negative(network), config.sigma_data, schedule)


class Negative:
    """−F of a network F."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def __call__(self, x: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
        """−F(x, time, **condition)."""
        return -self.network(x, time, **condition)


def flow(network: Network, scheduler: Any) -> FromModule:
    """Rectified flow: the network takes T t; a scheduler's shift moves its sampler's times, not the process."""
    if scheduler.config.get("invert_sigmas"):
        raise UsageError("invert_sigmas is not supported: the network's time must grow with the noise")
    steps = scheduler.config.num_train_timesteps
    return FromModule(network, Rectified(), "velocity", time=lambda t: steps * t)


def from_diffusers(
    source: str | Path | tuple[nn.Module, Any] | Any,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> DiffusersDenoiser:
    """Make a teacher of a diffusers pipeline.

    Of a pipeline's folder or hub repository only `model_index.json`, the network (`unet` or `transformer`) and the
    scheduler are read. Classes are looked up in this module's lists, weights come from safetensors files: nothing that
    is downloaded is run. A folder is never looked for on the hub.

    Args:
        source: a folder or hub id of a pipeline, a pipeline, or a pair (network, scheduler).
        variant: of the weights' files, such as "fp16"; default those of no variant, else the only one.
        dtype: of the loaded weights; a pipeline or pair keeps its own.

    Raises:
        UsageError: where diffusers, a file or a component is missing, damaged or not supported.
    """
    if isinstance(source, (str, Path)):
        return DiffusersDenoiser(*load(str(source), variant, dtype))
    if isinstance(source, tuple):
        require(
            "a tuple", len(source), len(source) in (2, 3), "a network and its scheduler and, where told, its classes"
        )
        return DiffusersDenoiser(*source)
    network = getattr(source, "unet", None) or getattr(source, "transformer", None)
    if network is None or getattr(source, "scheduler", None) is None:
        raise UsageError(f"{type(source).__name__} has no unet or transformer, or no scheduler: it is not a pipeline")
    return DiffusersDenoiser(
        network, source.scheduler, latents=any(getattr(source, name, None) for name in AUTOENCODERS)
    )


def load(source: str, variant: str | None, dtype: torch.dtype) -> tuple[nn.Module, Any, int | None, bool]:
    """Of a pipeline's folder or hub repository what `DiffusersDenoiser` takes: classes if the index tells."""
    diffusers = import_diffusers()
    index = read_index(source)
    components = {name: v[1] for name, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}
    part = next((name for name in ("unet", "transformer") if name in components), None)
    if part is None or "scheduler" not in components:
        raise UsageError(f"{source}: model_index.json names no unet or transformer, or no scheduler")
    network_class, scheduler_class = components[part], components["scheduler"]
    if network_class not in NETWORKS:
        raise unsupported_network(network_class)
    if scheduler_class not in (*DISCRETE, *EDM, *FLOW):
        raise unsupported_scheduler(scheduler_class)
    is_folder = Path(source).is_dir()
    local = {"local_files_only": is_folder}
    if is_folder:  # the hub is not asked before something fails
        variant = found_variant(source, part, variant)
    weights = {"use_safetensors": True, "variant": variant, "torch_dtype": dtype, "output_loading_info": True}
    try:
        scheduler = getattr(diffusers, scheduler_class).from_pretrained(source, subfolder="scheduler", **local)
        network, info = getattr(diffusers, network_class).from_pretrained(source, subfolder=part, **local, **weights)
    except Exception as error:  # files may be missing, cut off or of other shapes: each reader has its own errors
        found = variant if is_folder else found_variant(source, part, variant)
        if found != variant:
            return load(source, found, dtype)
        raise unreadable(source, f"its {part} or scheduler", error) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UsageError(f"{source}: the weights of {part} lack {len(missing)} tensors, the first {missing[0]}")
    known = index.get("classes")
    classes = known if type(known) is int and known > 0 else None
    latents = index.get("latents") is True or any(name in components for name in AUTOENCODERS)
    return network, scheduler, classes, latents


def read_index(source: str) -> dict[str, Any]:
    """A pipeline's model_index.json: the library and class of its components, by component, and its settings."""
    folder = Path(source)
    if not folder.is_dir():
        check_hub_id(source)
    try:
        if folder.is_dir():
            text = (folder / "model_index.json").read_text(encoding="utf-8")
        else:
            from huggingface_hub import hf_hub_download

            require_answer(source)
            text = Path(hf_hub_download(source, "model_index.json")).read_text(encoding="utf-8")
        return dict(json.loads(text).items())
    except Exception as error:  # the hub's client has some twenty kinds
        raise unreadable(source, "model_index.json", error) from error


def found_variant(source: str, part: str, variant: str | None) -> str | None:
    """The variant of a pipeline's weights to load: the one asked for, else none, else the only one.

    Raises:
        UsageError: where there are several, another than the one asked for, or pickled weights alone.
    """
    names = [name for name in weights_files(source, part) if name.startswith(WEIGHTS)]
    safe = {variant_of(name) for name in names if name.endswith(".safetensors")}
    if variant in safe or not names:
        return variant
    if not safe:
        raise UsageError(
            f"{source}/{part} has its weights as pickle alone, which may run code of whoever made it; if trusted, "
            f'convert them: python -c "import diffusers as d; d.DiffusionPipeline.from_pretrained({source!r}, '
            "use_safetensors=False).save_pretrained('converted')\""
        )
    known = " and ".join(sorted(name or "none" for name in safe))
    if variant is not None:
        raise UsageError(f"{source}/{part} has no weights of the variant '{variant}': it has those of {known}")
    if len(safe) > 1:
        raise UsageError(f"{source}/{part} has weights of the variants {known}: say which by variant (--variant)")
    return safe.pop()


def variant_of(name: str) -> str | None:
    """Of a file of weights, as in `diffusion_pytorch_model.fp16.safetensors`; None for one without a variant."""
    return re.sub(r"-\d+-of-\d+", "", name.removeprefix(WEIGHTS).removesuffix(".safetensors")).lstrip(".") or None


def weights_files(source: str, part: str) -> list[str]:
    """The names of the files in a part of a pipeline's folder or hub repository; none where the hub does not answer."""
    if Path(source).is_dir():
        folder = Path(source) / part
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []
    try:
        from huggingface_hub import list_repo_tree

        return [Path(entry.path).name for entry in list_repo_tree(source, part)]
    except Exception:  # offline, say: weights that were downloaded before are read all the same
        return []


def unreadable(source: str, what: str, error: Exception) -> UsageError:
    """One line for a pipeline that could not be read."""
    kind = "" if Path(source).is_dir() else ", which is no folder here"
    return UsageError(f"cannot read {what} of the pipeline '{source}'{kind}: {reason(error)}")


def import_diffusers() -> Any:
    """The diffusers package; raises UsageError where it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise UsageError("diffusers pipelines need diffusers: pip install 'vardistill[diffusers]'") from error
