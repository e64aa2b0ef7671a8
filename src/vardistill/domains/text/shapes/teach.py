"""Fitting a text-to-image teacher of shapes: a whole `StableDiffusionPipeline`, of which nothing is downloaded.

Autoencoder and text encoder are fitted first. The U-Net is then fitted by denoising score matching on the latents of
captioned pictures, some of them under the empty prompt. The run folder holds, beside `config.yaml`, `metrics.jsonl` and
`checkpoints/`:

autoencoder/    as the pipeline has it
text_encoder/   likewise
pipeline/       the teacher, which diffusers loads and samples alone
pictures/       captioned pictures, of which students have their prompts
judge/          what its pictures, and its students', are judged by
evaluation.json the teacher's pictures by steps of Heun's method and by guidance
samples.png     some of them
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vardistill.denoisers import Guided, dsm_loss
from vardistill.denoisers.diffusers import DiffusersDenoiser, import_diffusers
from vardistill.devices import find_device
from vardistill.diffusion.noise import NoiseLevels
from vardistill.diffusion.samplers import sample
from vardistill.diffusion.weights import named_weight
from vardistill.domains.pictures.figures import save_grids
from vardistill.domains.text.captioned import save_captioned
from vardistill.domains.text.families import decoded
from vardistill.domains.text.shapes import networks
from vardistill.domains.text.shapes.autoencoder import encoded_pictures, kept_autoencoder
from vardistill.domains.text.shapes.config import ShapesTeachConfig
from vardistill.domains.text.shapes.encoder import kept_text_encoder, states_of
from vardistill.domains.text.shapes.evaluate import Truth, asked_twice
from vardistill.domains.text.shapes.formula import scenes
from vardistill.domains.text.shapes.judge import kept_judge
from vardistill.files import check_free, whole, write_whole
from vardistill.progress import bar, phase, say
from vardistill.training.config import TrainingConfig
from vardistill.training.fitting import Fit, begin
from vardistill.training.folder import RunFolder

STEPS = (18, 40)
"""Of Heun's method, for the teacher's own pictures."""

GUIDANCES = (1.0, 2.0, 3.0)
"""That are tried, on a part of the pictures; the one of the best prompt accuracy is taken."""

TRIED = 100
"""Pictures by which guidance is chosen, at most."""

BLOCK = 100
"""Pictures that are drawn at once."""

SHOWN = 64
"""Pictures that are shown, at most."""


def teach_shapes(config: ShapesTeachConfig, out: Path, resume: bool = False) -> RunFolder:
    """Fit a pipeline in the run folder `out`, or go on with one that was stopped.

    Raises:
        UsageError: for a folder that cannot be used, a device that is not there, or without diffusers.
        Interrupted: after Ctrl-C, with a checkpoint kept.
        Diverged: after too many skipped steps, or for a result that is not finite, with a checkpoint kept.
    """
    words = networks.tokenizer()
    folder = begin(config, out, resume)
    with folder.held():
        seed, sizes = config.seed, (config.text_width, config.text_layers)
        autoencoder = kept_autoencoder(folder.path / "autoencoder", seed, config.autoencoder_steps)
        encoder = kept_text_encoder(folder.path / "text_encoder", words, *sizes, seed, config.text_steps)
        with phase("drawing captioned pictures"):
            fit = build_fit(config, words, encoder, autoencoder)

    def save(fitted: DiffusersDenoiser, path: Path) -> None:
        save_pipeline(fitted, words, encoder, autoencoder, path)

    fit.run(config, out, True, "pipeline", save)
    keep_pictures(config, folder.path / "pictures")
    evaluate_teacher(config, fit.average, words, encoder, autoencoder, folder)
    return folder


def build_fit(config: ShapesTeachConfig, words: Any, encoder: Any, autoencoder: Any) -> Fit[DiffusersDenoiser]:
    """An untrained U-Net, and what fits it to the latents of captioned pictures."""
    device = find_device(config.device)
    network = networks.unet(config.network, config.text_width, config.seed)
    denoiser = DiffusersDenoiser(network, networks.scheduler(), latents=True).to(device)
    seen = scenes(config.pictures, torch.Generator().manual_seed(config.seed))
    scaling = autoencoder.config.scaling_factor
    mean, std = (scaling * v.to(device) for v in encoded_pictures(autoencoder, seen.pictures))
    number = {text: i for i, text in enumerate(dict.fromkeys(["", *seen.captions]))}
    states = states_of(encoder, words, list(number)).to(device)
    texts = torch.tensor([number[text] for text in seen.captions], device=device)
    levels = NoiseLevels(denoiser.schedule, config.distribution, named_weight("edm", 1.0))

    def loss(denoiser: DiffusersDenoiser, progress: float, rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(mean), (config.batch,), generator=rng, device=device)
        x = mean[rows] + std[rows] * torch.randn(config.batch, *mean.shape[1:], generator=rng, device=device)
        dropped = torch.rand(config.batch, generator=rng, device=device) < config.prompt_dropout
        noise = levels.draw(x.shape[1:], len(x), progress, rng)
        told = states[texts[rows].masked_fill(dropped, 0)]
        return dsm_loss(denoiser, x, noise, encoder_hidden_states=told).mean()

    training = TrainingConfig(
        steps=config.steps,
        max_minutes=config.max_minutes,
        clock=config.clock,
        lr=config.lr,
        clip=1.0,
        ema=config.ema,
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
        max_skipped=config.max_skipped,
    )
    return Fit(denoiser, loss, training)


def save_pipeline(fitted: DiffusersDenoiser, words: Any, encoder: Any, autoencoder: Any, path: Path) -> None:
    """The whole pipeline as a folder of diffusers, whole or not at all."""
    pipeline = import_diffusers().StableDiffusionPipeline(
        vae=autoencoder, text_encoder=encoder, tokenizer=words, unet=fitted.network,
        scheduler=fitted.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with whole(path, folder=True) as partial:
        check_free(path)
        pipeline.save_pretrained(partial)


def keep_pictures(config: ShapesTeachConfig, path: Path) -> None:
    """Captioned pictures in the folder `path`, where there are none yet: other ones than the teacher's."""
    if path.is_dir():
        return
    seen = scenes(config.kept, torch.Generator().manual_seed(config.seed + 4))
    with whole(path, folder=True) as partial:
        save_captioned(seen.pictures, seen.captions, partial)


def evaluate_teacher(
    config: ShapesTeachConfig, teacher: DiffusersDenoiser, words: Any, encoder: Any, autoencoder: Any, folder: RunFolder
) -> None:
    """Choose the guidance, judge the teacher's pictures under it, and show some."""
    judge = kept_judge(folder.path / "judge", config.seed)
    prompts = asked_twice(config.eval_samples, config.seed + 1)
    states, empty = states_of(encoder, words, prompts), states_of(encoder, words, [""])
    device = next(teacher.parameters()).device

    def drawn(guidance: float, steps: int, n: int) -> tuple[Tensor, float]:
        """Pictures of the first n prompts, and the seconds that they took."""
        guided = Guided(teacher, guidance, {"encoder_hidden_states": empty.to(device)})
        rng = torch.Generator(device).manual_seed(config.seed + 2)
        started, blocks = time.perf_counter(), []
        for part in bar(
            states[:n].split(BLOCK), name=f"pictures, guidance {guidance:g}, {steps} steps", unit="batches"
        ):
            noise = torch.randn(len(part), *teacher.data_shape, generator=rng, device=device)
            x = sample(guided, noise, steps, encoder_hidden_states=part.to(device))
            blocks.append(decoded(autoencoder, x.cpu()))
        return torch.cat(blocks), time.perf_counter() - started

    truth, tried = Truth(judge, prompts, config.seed + 3), min(len(prompts), TRIED)
    first = {w: truth.judge.accuracy(drawn(w, STEPS[0], tried)[0], prompts[:tried]).double().mean() for w in GUIDANCES}
    best = max(first, key=lambda w: float(first[w]))
    say(
        f"guidance {', '.join(f'{w:g}: {v:.1%}' for w, v in first.items())} of {tried} prompts right; {best:g} is taken"
    )
    table, shown = {}, {}
    for steps in STEPS:
        x, seconds = drawn(best, steps, len(prompts))
        evaluations = (2 * steps - 1) * (1 if best == 1 else 2)
        costs = {"evaluations": evaluations, "seconds_per_image": seconds / len(x), "samples": len(x)}
        table[f"{steps} steps"] = truth.table(x) | {"guidance": best} | costs
        shown[f"Teacher, {steps} steps, guidance {best:g}"] = x[:SHOWN]
    write_whole(folder.path / "evaluation.json", json.dumps(table, indent=2))
    save_grids(shown, folder.path / "samples.png")
