"""Text-to-image students for diffusers alone: whole pipelines, LoRA files under both kinds of names, two of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import at_size
import tiny_pipelines
from vardistill.denoisers import from_diffusers
from vardistill.denoisers.adapters import adapted_layers
from vardistill.denoisers.prompted import Conditions, prompted
from vardistill.domains.text.families import encoded, load_pipeline
from vardistill.errors import UsageError
from vardistill.export import export_lora, export_whole
from vardistill.export.lora import KOHYA, kohya
from vardistill.export.schedulers import renoising
from vardistill.students import MLP, NetworkStudent

PROMPT, N, SEED, OTHER = "a red dog", 2, 1, 0.5

FAMILIES: dict[str, Callable[[Path], Path]] = tiny_pipelines.MAKERS | {
    "sd2": partial(tiny_pipelines.stable_diffusion, prediction="v_prediction")
}
STEPS = {"sd": 1, "sdxl": 2, "sd3": 4, "sd2": 4}
KINDS: dict[str, tuple[str, ...]] = {
    "sd": ("merged", "copied", "lora", "two", "kohya"),
    "sdxl": ("merged", "lora", "two", "kohya"),
    "sd3": ("merged", "copied", "lora", "two"),
    "sd2": ("merged",),
}
ALL = [f"{family} {kind}" for family, kinds in KINDS.items() for kind in kinds]

ALONE = """
import json, sys
sys.modules["vardistill"] = None
import diffusers, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
diffusers.utils.logging.disable_progress_bar()
made = {}
for name, job in json.load(sys.stdin).items():
    z, prompt = load_file(job["z"])["z"], [job["prompt"]] * 2
    *lines, last = job["lines"].splitlines()
    if "teacher" in job:
        pipeline = DiffusionPipeline.from_pretrained(job["teacher"], **job["missing"])
    exec("\\n".join(lines))
    if "other" in job:
        pipeline.load_lora_weights(job["other"], adapter_name="other")
        pipeline.set_adapters(["default_0", "other"], [1.0, job["weight"]])
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(1)  # flow matching renoises by the global generator, whatever it is given
    settings = {"latents": z, "output_type": "latent", "generator": torch.Generator().manual_seed(1)}
    exec(last.replace("pipeline(prompt,", "pipeline(prompt, **settings,"))
    made[name] = pictures.contiguous()
save_file(made, sys.argv[1])
"""


RANKS = {"merged": 2, "two": 3, "copied": 0}


def students_of(folder: Path, steps: int, kinds: tuple[str, ...]) -> dict[str, NetworkStudent]:
    """Students under one prompt whose adapters, or weights, have moved."""
    conditions = Conditions(encoded(load_pipeline(str(folder)), [PROMPT]))
    teacher = prompted(from_diffusers(folder), conditions)
    flow = "FlowMatch" in type(teacher.scheduler).__name__
    times = [1.0, 0.75, 0.5, 0.25][:steps] if flow else [i / 999 for i in (999, 749, 499, 249)][:steps]
    found = {}
    for kind in RANKS.keys() & kinds:
        torch.manual_seed(rank := RANKS[kind])
        student = NetworkStudent.from_teacher(teacher, None, 0, 1.0, times=times, rank=rank)
        if not rank:
            student.denoiser = prompted(student.denoiser, conditions)
        for name, p in student.named_parameters():
            if not rank or "lora_B" in name:
                with torch.no_grad():
                    p.add_(torch.randn_like(p), alpha=0.05 if rank else 0.01)
        found[kind] = student.eval()
    return found


@torch.no_grad()
def drawn(student: NetworkStudent, z: Tensor) -> Tensor:
    renoise = torch.randn(student.steps - 1, *z.shape, generator=torch.Generator().manual_seed(SEED))
    return student(z, renoise, labels=torch.zeros(len(z), dtype=torch.int64))


def beside(student: NetworkStudent, other: NetworkStudent) -> NetworkStudent:
    """The student with W + B A + ½ B′ A′."""
    both = student.merged()
    found: Any = other.denoiser
    layers = dict(adapted_layers(found.network))
    with torch.no_grad():
        for name, layer in layers.items():
            weight: Any = both.denoiser.network.get_submodule(name).weight
            weight += OTHER * layer.get_delta_weight("default")
    return both


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Tensor, Tensor]]]:
    """By family and kind, a student's own latents and those of a process without this library, by the printed lines."""
    root = tmp_path_factory.mktemp("exported")
    z = torch.randn(N, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    save_file({"z": z}, root / "z.safetensors")
    own: dict[str, Tensor] = {}
    jobs: dict[str, dict[str, Any]] = {}

    def job(name: str, student: NetworkStudent, lines: str, **more: Any) -> None:
        own[name] = drawn(student, z)
        jobs[name] = {"lines": lines, "prompt": PROMPT, "z": str(root / "z.safetensors"), **more}

    for family, make in FAMILIES.items():
        folder, path = make(root / family), root / f"{family}-exported"
        missing = dict.fromkeys(["text_encoder_3", "tokenizer_3"] if family == "sd3" else [])
        load, teacher = partial(load_pipeline, str(folder)), {"teacher": str(folder), "missing": missing}
        students = students_of(folder, STEPS[family], KINDS[family])
        student = students["merged"]
        for kind in {"merged", "copied"} & students.keys():
            job(f"{family} {kind}", students[kind], export_whole(students[kind], load, path / kind))
        if "lora" not in KINDS[family]:
            continue
        lines = export_lora(student, path / "lora")
        job(f"{family} lora", student, lines, **teacher)
        export_lora(students["two"], path / "other")
        second = {"other": str(path / "other"), "weight": OTHER}
        job(f"{family} two", beside(student, students["two"]), lines, **teacher, **second)
        if (path / "lora" / KOHYA).is_file():
            named = lines.replace('/lora")', f'/lora", weight_name={KOHYA!r})')
            job(f"{family} kohya", student, named, **teacher)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(root / "made.safetensors")],
        input=json.dumps(jobs), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = load_file(root / "made.safetensors")
    return root, {name: (x, theirs[name]) for name, x in own.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_process_without_this_library_makes_the_same_latents(
    name: str, made: tuple[Path, dict[str, tuple[Tensor, Tensor]]]
) -> None:
    own, theirs = made[1][name]
    torch.testing.assert_close(theirs, own, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_students_and_kinds_differ(made: tuple[Path, dict[str, tuple[Tensor, Tensor]]]) -> None:
    """So that none of these is another's."""
    for family in ("sd", "sdxl", "sd3"):
        x = {kind: made[1][name][0] for name in made[1] for kind in RANKS if name == f"{family} {kind}"}
        for a, b in combinations(x, 2):
            assert (x[a] - x[b]).abs().max() > 0.01


@pytest.mark.slow
def test_nothing_tells_where_it_was_read_from(made: tuple[Path, dict[str, tuple[Tensor, Tensor]]]) -> None:
    files = [path for path in made[0].glob("*-exported/**/*") if path.suffix in (".json", ".md")]
    assert len(files) > 30
    for file in files:
        assert str(made[0]) not in file.read_text(), file


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_every_layer_has_a_name_of_kohyas_that_diffusers_reads_back(kind: str) -> None:
    """Of the networks at their size, without their weights."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
    from diffusers.utils import convert_unet_state_dict_to_peft

    network = at_size.network(kind)
    layers = [name for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    factors = {f"unet.{name}.lora_{part}.weight": torch.full((3,), i) for i, name in enumerate(layers) for part in "AB"}
    found, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(kohya(factors), unet_config=network.config)
    back = convert_unet_state_dict_to_peft({name.removeprefix("unet."): v for name, v in found.items()})
    assert {f"unet.{name}": int(v[0]) for name, v in back.items()} == {name: int(v[0]) for name, v in factors.items()}
    assert len(alphas) == len(layers)
    assert set(alphas.values()) == {3.0}


def test_what_is_no_pipeline_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a MLP is no network of a pipeline"):
        export_whole(MLP(depth=1, width=8), partial(load_pipeline, "x"), tmp_path / "a")
    with pytest.raises(UsageError, match="takes a student's path under EDMEulerScheduler"):
        renoising(diffusers.EDMEulerScheduler(), [0.5])
