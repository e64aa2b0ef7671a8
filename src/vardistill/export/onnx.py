"""Trained generators for other programs: diffusers' pipelines and ONNX files."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vardistill.denoisers.diffusers import DiffusersDenoiser
from vardistill.errors import UsageError
from vardistill.export.pipelines import save_pipeline, usage_of
from vardistill.files import whole
from vardistill.students.network import NetworkStudent
from vardistill.students.student import Student

LARGEST_ONNX = 2**31
"""Bytes that an ONNX file holds, a limit of its format."""

BATCH_AXIS = {"renoise": 1}
"""The axis of B in an input, where it is not the first."""

CHECKED = (1, 5)
"""Batch sizes at which an ONNX file is run; it is traced at another."""


def export_diffusers(generator: Student, path: Path | str, card: str | None = None) -> str:
    """Save a student as a folder that diffusers loads alone, its adapters merged; see `pipelines.save_pipeline`.

    Args:
        generator: a `NetworkStudent`, of any number of steps.
        path: the folder, new or empty.
        card: text of README.md; default how to load the folder.

    Returns:
        Python that loads the folder and draws pictures.

    Raises:
        UsageError: for a generator without a network of diffusers, or a folder that is not empty.
    """
    if not isinstance(generator, NetworkStudent):
        raise UsageError(f"a {type(generator).__name__} is no network of diffusers: export it to onnx instead")
    denoiser = generator.merged().denoiser
    assert isinstance(denoiser, DiffusersDenoiser)
    save_pipeline(denoiser, Path(path), generator.times, generator.classes, card)
    return usage_of(denoiser, generator.steps, folder=str(path))


def export_onnx(generator: Student, path: Path | str, tolerance: float = 1e-4) -> float:
    """Save x = g(z) as an ONNX file, and compare it with the generator on random z.

    Its inputs are `z` (B, *latent), for a generator of n > 1 steps `renoise` (n − 1, B, *data), and for a conditional
    one `labels` (B,) of int64; its output is `x`. Any B will do.

    Args:
        generator: in float32.
        path: the file, which is replaced.
        tolerance: largest |difference| of a value of x.

    Returns:
        The largest difference that was seen, at two batch sizes.

    Raises:
        UsageError: without onnx, onnxscript and onnxruntime, for weights above 2 GiB, conditions other than labels, or
            a file that cannot be written.
        RuntimeError: where the file's results differ by more than the tolerance; then there is no file.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UsageError(f"onnx files need {' and '.join(missing)}: pip install 'vardistill[onnx]'")
    if foreign := set(generator.condition_names) - {"labels"}:
        raise UsageError(f"onnx files take labels as a condition, but no {', '.join(sorted(foreign))}")
    if sum(p.numel() * p.element_size() for p in generator.parameters()) >= LARGEST_ONNX:
        raise UsageError("the weights take more than 2 GiB, and an ONNX file holds no more")
    function, path = traceable(generator), Path(path)
    with whole(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_onnx(function, inputs(generator, 2), partial)
        error = onnx_error(generator, partial)
        if not error <= tolerance:
            raise RuntimeError(
                f"the ONNX file's x differs by {error:.3g} from the generator's, more than {tolerance:g}"
            )
    return error


def onnx_usage(generator: Student, path: Path | str, n: int = 16) -> str:
    """Python that draws n samples by the file of this generator, without this library."""
    given = {name: tuple(v.shape) for name, v in inputs(generator, n).items()}
    drawn = {name: f'rng.standard_normal({shape}, dtype="float32")' for name, shape in given.items()}
    if generator.classes:
        drawn["labels"] = f'numpy.arange({n}, dtype="int64") % {generator.classes}'
    return "\n".join(
        [
            "import numpy, onnxruntime",
            "rng = numpy.random.default_rng(0)",
            *(f"{name} = {value}" for name, value in drawn.items()),
            f"session = onnxruntime.InferenceSession({json.dumps(str(path), ensure_ascii=False)})",
            f"(x,) = session.run(None, {{{', '.join(f'{json.dumps(name)}: {name}' for name in drawn)}}})",
        ]
    )


def write_onnx(function: nn.Module, example: dict[str, Tensor], path: Path) -> None:
    """Trace a function of tensors given by name, with B left open."""
    batch = torch.export.Dim("batch")
    with quiet_exporter():
        torch.onnx.export(
            function,
            kwargs=example,
            f=path,
            input_names=list(example),
            output_names=["x"],
            dynamic_shapes={name: {BATCH_AXIS.get(name, 0): batch} for name in example},
            external_data=False,
            dynamo=True,
            verbose=False,
        )


@torch.no_grad()
def onnx_error(generator: Student, path: Path) -> float:
    """The largest |difference| between the file's x and the generator's, over the batch sizes `CHECKED`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    errors = []
    for n in CHECKED:
        given = inputs(generator, n)
        (x,) = session.run(None, {name: v.cpu().numpy() for name, v in given.items()})
        errors.append((torch.from_numpy(x) - generator(**given).cpu()).abs().max())
    return float(torch.stack(errors).max())  # NaN where there is one


def inputs(generator: Student, n: int) -> dict[str, Tensor]:
    """z (n, *latent), renoise for several steps, and labels (n,) in turn for a conditional generator."""
    device = next(generator.parameters()).device
    rng = torch.Generator(device).manual_seed(n)
    given = {"z": generator.latents(n, rng)}
    if generator.steps > 1:
        given["renoise"] = generator.renoise(n, rng)
    if generator.classes:
        given["labels"] = torch.arange(n, device=device) % generator.classes
    return given


def traceable(generator: Student) -> nn.Module:
    """The generator as a function that a tracer follows: evaluation mode, no adapters, no tables."""
    if not isinstance(generator, NetworkStudent):
        return Function(copy.deepcopy(generator)).eval()
    student = generator.merged()
    denoise: Any = student.denoiser._denoise
    denoise.schedule = Known(student.times, student.levels)
    return Function(student).eval()


class Function(nn.Module):
    """x = g(z) whose inputs all have names, as tracers of open shapes want them."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, z: Tensor, renoise: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """x, (B, *data)."""
        x: Tensor = self.student(z, renoise, **({} if labels is None else {"labels": labels}))
        return x


@dataclass(frozen=True)
class Known:
    """A schedule by its values (α, σ) at a student's times, as numbers."""

    times: tuple[float, ...]
    levels: tuple[tuple[float, float], ...]

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t."""
        alpha, sigma = (t.new_full(t.shape, value) for value in self.levels[0])
        for time, level in zip(self.times[1:], self.levels[1:], strict=True):
            here = t == t.new_full(t.shape, time)
            alpha, sigma = alpha.where(~here, level[0]), sigma.where(~here, level[1])
        return alpha, sigma


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without the exporter's own warnings, its notes on packages that are not installed and on guards that it drops."""
    levels = {logging.getLogger("torch.onnx"): logging.ERROR, logging.getLogger("torch._guards"): logging.CRITICAL}
    before = {logger: logger.level for logger in levels}
    for logger, level in levels.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
