"""diffusers' networks and schedulers as teachers: the same noising and the same E[x | x_t] as diffusers' own."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tiny_models import tiny_dit, tiny_pipeline_folder, tiny_unet
from vardistill.denoisers import DiffusersDenoiser, from_diffusers, reschedule
from vardistill.denoisers.diffusers import DISCRETE
from vardistill.diffusion import Denoiser, check_denoiser, score, to_x
from vardistill.diffusion.schedules import VE, VP, Rectified, Table
from vardistill.errors import UsageError

STEPS = torch.tensor([0, 1, 17, 500, 998, 999])

every_beta = pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
every_prediction = pytest.mark.parametrize(
    ("predicts", "rescale"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", False), ("sample", True)],
)
both_edm_predictions = pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ddim(**options: Any) -> diffusers.DDIMScheduler:
    """A DDIM scheduler that computes in double precision."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **options)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


def noised(teacher: DiffusersDenoiser, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = (scale.view(-1, 1, 1, 1) for scale in teacher.schedule(t))
    return alpha * x + sigma * eps


class Recorder(nn.Module):
    """Stands in the network's place inside a teacher, and keeps what it was called with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, list[dict[str, Any]]()

    def forward(self, **given: Any) -> tuple[Tensor]:
        self.calls.append(given)
        return self.network(**given)


@every_beta
@every_prediction
def test_discrete_noising_is_add_noise(betas: str, predicts: str, rescale: bool) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule=betas, prediction_type=predicts, rescale_betas_zero_snr=rescale)
    teacher = DiffusersDenoiser(tiny_unet().double(), scheduler)
    x, eps = normal(6, 1, 8, 8), normal(6, 1, 8, 8, seed=1)
    ours = noised(teacher, x, eps, STEPS.double() / 999)
    torch.testing.assert_close(ours, scheduler.add_noise(x, eps, STEPS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DISCRETE)
def test_every_discrete_scheduler(name: str) -> None:
    """All of a family have the same forward process, whatever their sampler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # some of them read tensors into numpy as it was before 2.0
        scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    teacher = DiffusersDenoiser(tiny_unet(), scheduler)
    reference = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert teacher.schedule == Table(tuple(reference.alphas_cumprod.tolist()))
    x_t, t = normal(2, 1, 8, 8).float(), torch.tensor([0.2, 0.8])
    assert torch.equal(teacher(x_t, t), DiffusersDenoiser(tiny_unet(), reference)(x_t, t))


@every_beta
@every_prediction
def test_discrete_denoiser_is_ddim_s_original_sample(betas: str, predicts: str, rescale: bool) -> None:
    scheduler = ddim(beta_schedule=betas, prediction_type=predicts, rescale_betas_zero_snr=rescale)
    network = tiny_unet().double()
    teacher = DiffusersDenoiser(network, scheduler)
    scheduler.set_timesteps(1000)
    for i, step in enumerate(STEPS):
        x_t = normal(2, 1, 8, 8, seed=i)
        prediction = network(x_t, step).sample
        theirs = scheduler.step(prediction, int(step), x_t).pred_original_sample
        ours = teacher(x_t, torch.full((2,), float(step) / 999, dtype=torch.float64))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_epsilon_at_zero_terminal_snr_is_refused() -> None:
    """Also for schedulers that put 2⁻²⁴ in the place of ᾱ = 0."""
    for scheduler in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler):
        with pytest.raises(UsageError, match="zero terminal SNR"):
            DiffusersDenoiser(tiny_unet(), scheduler(rescale_betas_zero_snr=True))
        v = scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
        assert DiffusersDenoiser(tiny_unet(), v).schedule(torch.ones(1))[0] < 1e-15


def test_v_at_zero_terminal_snr_is_minus_the_network() -> None:
    """At α = 0, v = −x: the denoiser there is −v, whatever x_t."""
    network = tiny_unet().double()
    teacher = DiffusersDenoiser(network, ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True))
    x_t = normal(2, 1, 8, 8)
    ours = teacher(x_t, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(ours, -network(x_t, 999).sample, rtol=0, atol=1e-12)


@both_edm_predictions
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm(predicts: str, name: str) -> None:
    """Noising is add_noise; the denoiser is the scheduler's preconditioning around the network."""
    scheduler = getattr(diffusers, name)(sigma_min=0.01, sigma_max=50.0, sigma_data=0.7, prediction_type=predicts)
    network = tiny_unet().double()
    teacher = DiffusersDenoiser(network, scheduler)
    assert teacher.schedule == VE(0.01, 50.0)
    sigmas, times = (values[[0, 10, 500, 990]] for values in (scheduler.sigmas, scheduler.timesteps))
    t = teacher.schedule.time(sigmas.double())
    x, eps = normal(4, 1, 8, 8), normal(4, 1, 8, 8, seed=1)
    x_t = noised(teacher, x, eps, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x, eps, times), rtol=0, atol=1e-12)
    sigma = sigmas.double().view(-1, 1, 1, 1)
    prediction = network(
        scheduler.precondition_inputs(x_t, sigma), scheduler.precondition_noise(sigmas.double())
    ).sample
    theirs = scheduler.precondition_outputs(x_t, prediction, sigma)
    torch.testing.assert_close(teacher(x_t, t), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_matching(name: str, shift: float) -> None:
    """Noising is scale_noise; x = x_t − σ v; the sampler's shift leaves the denoiser as it is."""
    scheduler = getattr(diffusers, name)(shift=shift)
    network = tiny_unet().double()
    teacher = DiffusersDenoiser(network, scheduler)
    assert teacher.schedule == Rectified()
    times = scheduler.timesteps[[0, 10, 500, 999]]
    t = times.double() / 1000
    x, eps = normal(4, 1, 8, 8), normal(4, 1, 8, 8, seed=1)
    x_t = noised(teacher, x, eps, t)
    rows = [(x[i : i + 1], times[i : i + 1], eps[i : i + 1]) for i in range(4)]
    theirs = torch.cat([getattr(diffusers, name)(shift=shift).scale_noise(*row) for row in rows])
    torch.testing.assert_close(x_t, theirs, rtol=0, atol=1e-6)
    velocity = network(x_t, times.double()).sample
    torch.testing.assert_close(teacher(x_t, t), x_t - t.view(-1, 1, 1, 1) * velocity, rtol=1e-6, atol=1e-6)


SCHEDULERS = [
    diffusers.DDIMScheduler(),
    diffusers.DDIMScheduler(prediction_type="v_prediction"),
    diffusers.EDMEulerScheduler(),
    diffusers.FlowMatchEulerDiscreteScheduler(),
]
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)


@every_scheduler
def test_denoiser_to_score_and_back(scheduler: Any) -> None:
    teacher = DiffusersDenoiser(tiny_unet().double(), scheduler)
    x_t, t = normal(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    alpha, sigma = (scale.view(-1, 1, 1, 1) for scale in teacher.schedule(t))
    x = teacher(x_t, t)
    torch.testing.assert_close(to_x("score")(score(teacher, x_t, t), x_t, alpha, sigma), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reschedule(reschedule(teacher, VP()), teacher.schedule)(x_t, t), x, rtol=1e-6, atol=1e-6)


@every_scheduler
def test_is_a_differentiable_denoiser(scheduler: Any) -> None:
    teacher = DiffusersDenoiser(tiny_unet(channels=3), scheduler)
    assert isinstance(teacher, Denoiser)
    assert (teacher.data_shape, teacher.classes) == ((3, 8, 8), 0)
    check_denoiser(teacher, teacher.data_shape, torch.zeros(()))
    x_t = normal(2, 3, 8, 8).float().requires_grad_()
    teacher(x_t, torch.tensor([0.3, 0.7])).square().sum().backward()
    gradients = [x_t.grad, *(parameter.grad for parameter in teacher.network.parameters())]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert all(name.startswith("network.") for name in teacher.state_dict())


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, diffusers.EDMEulerScheduler(prediction_type="v_prediction")])
def test_a_copy_stands_alone(scheduler: Any) -> None:
    """Students start as deep copies of their teacher: changing one leaves the other as it was."""
    teacher = DiffusersDenoiser(tiny_unet(), scheduler)
    x_t, t = normal(2, 1, 8, 8).float(), torch.tensor([0.3, 0.7])
    before = teacher(x_t, t)
    student = copy.deepcopy(teacher)
    assert torch.equal(student(x_t, t), before)
    with torch.no_grad():
        student.network.conv_out.bias.add_(1)
    assert torch.equal(teacher(x_t, t), before)
    assert not torch.allclose(student(x_t, t), before)


def test_start_of_the_noise() -> None:
    """1 where the variance is preserved; σ_t elsewhere."""
    preserved, exploding, flow = (
        DiffusersDenoiser(tiny_unet(), scheduler)
        for scheduler in (
            diffusers.DDIMScheduler(),
            diffusers.EDMEulerScheduler(sigma_max=80.0),
            diffusers.FlowMatchEulerDiscreteScheduler(),
        )
    )
    assert [preserved.init_scale(t) for t in (0.3, 1.0)] == [1.0, 1.0]
    assert exploding.init_scale(1.0) == pytest.approx(80.0)
    assert exploding.init_scale(0.5) == pytest.approx((0.002 * 80.0) ** 0.5)
    assert [flow.init_scale(t) for t in (0.3, 1.0)] == [0.3, 1.0]


def test_labels_reach_the_network() -> None:
    teacher = DiffusersDenoiser(tiny_unet(classes=4), diffusers.DDIMScheduler())
    assert teacher.classes == 4
    x_t, t = normal(1, 1, 8, 8).float().expand(4, 1, 8, 8), torch.full((4,), 0.4)
    x = teacher(x_t, t, labels=torch.arange(4))
    assert torch.pdist(x.flatten(1)).min() > 1e-3
    x[:2].square().sum().backward()
    used = teacher.network.class_embedding.weight.grad.abs().sum(1) > 0
    assert used.tolist() == [True, True, False, False]
    with pytest.raises(UsageError, match="conditional on 4 classes: give labels"):
        teacher(x_t, t)
    with pytest.raises(UsageError, match="has no classes, but labels were given"):
        DiffusersDenoiser(tiny_unet(), diffusers.DDIMScheduler())(x_t, t, labels=torch.arange(4))


def test_dit_with_a_learned_variance() -> None:
    """The first C channels are the prediction, and the row after the classes is no class."""
    network = tiny_dit(classes=3, channels=2).double()
    nn.init.normal_(network.proj_out_2.weight, generator=torch.Generator().manual_seed(0))
    teacher = DiffusersDenoiser(network, ddim(prediction_type="sample"))
    assert (teacher.data_shape, teacher.classes) == ((2, 8, 8), 3)
    x_t, labels = normal(1, 2, 8, 8).expand(4, 2, 8, 8), torch.arange(4)
    x = teacher(x_t, torch.full((4,), 500 / 999, dtype=torch.float64), labels=labels)
    prediction = network(x_t, torch.full((4,), 500.0), class_labels=labels).sample
    assert prediction.shape == (4, 4, 8, 8)
    torch.testing.assert_close(x, prediction[:, :2], rtol=1e-6, atol=1e-6)
    unet = DiffusersDenoiser(tiny_unet(channels=1, out_channels=2), diffusers.DDIMScheduler())
    assert unet(x_t[:, :1].float(), torch.full((4,), 0.5)).shape == (4, 1, 8, 8)


def test_text_condition() -> None:
    network = diffusers.UNet2DConditionModel(
        sample_size=(8, 16),
        in_channels=2,
        out_channels=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()
    teacher = DiffusersDenoiser(network, diffusers.DDIMScheduler(prediction_type="v_prediction"))
    assert (teacher.data_shape, teacher.classes) == ((2, 8, 16), 0)
    x_t, t, text = normal(2, 2, 8, 16).float(), torch.tensor([0.3, 0.6]), normal(2, 5, 8, seed=1).float()
    x = teacher(x_t, t, encoder_hidden_states=text)
    assert not torch.allclose(x, teacher(x_t, t, encoder_hidden_states=-text))


def test_sd3_takes_times_up_to_a_thousand() -> None:
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=2,
        out_channels=2,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
    ).eval()
    teacher = DiffusersDenoiser(network, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    x_t, t = normal(2, 2, 8, 8).float(), torch.tensor([0.25, 0.5])
    condition = {"encoder_hidden_states": normal(2, 3, 8).float(), "pooled_projections": normal(2, 6).float()}
    velocity = network(hidden_states=x_t, timestep=torch.tensor([250.0, 500.0]), **condition).sample
    torch.testing.assert_close(teacher(x_t, t, **condition), x_t - t.view(-1, 1, 1, 1) * velocity)


def test_the_network_s_time() -> None:
    """(T − 1) t, ¼ ln σ and T t, also between the integers."""
    t = torch.tensor([0.25, 0.7501], dtype=torch.float64)
    expected = [999 * t, VE(0.002, 80.0)(t)[1].log() / 4, 1000 * t]
    schedulers = diffusers.DDPMScheduler(), diffusers.EDMEulerScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()
    for scheduler, time in zip(schedulers, expected, strict=True):
        teacher = DiffusersDenoiser(tiny_unet().double(), scheduler)
        teacher.network = recorder = Recorder(teacher.network)
        teacher(normal(2, 1, 8, 8), t)
        torch.testing.assert_close(recorder.calls[0]["timestep"], time)


def test_folder_pipeline_and_pair_are_one_teacher(tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    folder = tiny_pipeline_folder(tmp_path, tiny_unet(seed=3), scheduler)
    pipeline = diffusers.DDPMPipeline(unet=tiny_unet(seed=3), scheduler=scheduler)
    x_t, t = normal(2, 1, 8, 8).float(), torch.tensor([0.3, 0.7])
    expected = DiffusersDenoiser(tiny_unet(seed=3), scheduler)
    for source in (folder, str(folder), pipeline, (tiny_unet(seed=3), scheduler)):
        teacher = from_diffusers(source)
        assert teacher.schedule == expected.schedule
        assert not teacher.network.training
        assert torch.equal(teacher(x_t, t), expected(x_t, t))


def test_transformer_pipelines_and_dtypes(tmp_path: Path) -> None:
    """A DiT's folder, with a component that is neither read nor known."""
    tiny_dit().save_pretrained(tmp_path / "transformer", variant="fp16")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {"0": "tench"},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["somewhere", "Autoencoder"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    teacher = from_diffusers(tmp_path, variant="fp16", dtype=torch.bfloat16)
    assert teacher.classes == 3
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}


def test_pickle_is_refused_with_the_line_that_converts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    expected = from_diffusers(tmp_path / "theirs").network.state_dict()
    pickle_only(tmp_path / "theirs")
    with pytest.raises(UsageError, match="theirs/unet has its weights as pickle alone") as told:
        from_diffusers(tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    exec(str(told.value).split('python -c "')[1].removesuffix('"'))
    converted = from_diffusers("converted").network.state_dict()
    assert all(torch.equal(v, expected[name]) for name, v in converted.items())


@pytest.mark.parametrize("parts", ["10GB", "20KB"])
def test_the_only_variant_is_taken_and_of_several_one_is_named(parts: str, tmp_path: Path) -> None:
    folder = tiny_pipeline_folder(tmp_path / "x")
    whole = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    tiny_unet().save_pretrained(folder / "unet", variant="fp16", max_shard_size=parts)
    assert all(torch.equal(v, whole[name]) for name, v in from_diffusers(folder).network.state_dict().items())
    with pytest.raises(UsageError, match="no weights of the variant 'bf16': it has those of fp16"):
        from_diffusers(folder, variant="bf16")
    tiny_unet(seed=1).save_pretrained(folder / "unet", variant="ema", max_shard_size=parts)
    with pytest.raises(UsageError, match=r"weights of the variants ema and fp16: say which by variant \(--variant\)"):
        from_diffusers(folder)
    assert from_diffusers(folder, variant="fp16").classes == 0


def set_class(folder: Path, component: str, library: str, name: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index[component] = [library, name]
    (folder / "model_index.json").write_text(json.dumps(index))


def truncate(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def drop_a_tensor(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_out.bias"]
    save_file(tensors, weights, {"format": "pt"})


def pickle_only(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    tiny_unet().save_pretrained(folder / "unet", safe_serialization=False)


def no_scheduler(folder: Path) -> None:
    set_class(folder, "scheduler", "diffusers", "")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot read its unet or scheduler"),
        (drop_a_tensor, "weights of unet lack 1 tensors, the first conv_out.bias"),
        (lambda folder: (folder / "model_index.json").unlink(), "cannot read model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("[1"), "cannot read model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "cannot read model_index.json"),
        (lambda folder: (folder / "unet" / "config.json").write_text("{"), "cannot read its unet or scheduler"),
        (no_scheduler, "names no unet or transformer, or no scheduler"),
        (lambda folder: set_class(folder, "unet", "os", "system"), "network system is not supported: give one of DiT"),
        (lambda folder: set_class(folder, "unet", "diffusers", "FluxTransformer2DModel"), "packed latents"),
        (lambda folder: set_class(folder, "scheduler", "diffusers", "LCMScheduler"), "scheduler LCMScheduler is not"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: Any, message: str) -> None:
    folder = tiny_pipeline_folder(tmp_path)
    damage(folder)
    with pytest.raises(UsageError, match=message) as error:
        from_diffusers(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("known", [True, 2.0, "2", 0, None])
def test_classes_that_are_no_number_are_left_to_the_network(tmp_path: Path, known: Any) -> None:
    folder = tiny_pipeline_folder(tmp_path, tiny_unet(3))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"classes": known}))
    denoiser = from_diffusers(folder)
    assert (denoiser.classes, denoiser.classes_given, denoiser.null_label) == (3, False, None)


@pytest.mark.parametrize("source", ["no/pipeline", "./no/such/folder", "/no/such/folder"])
def test_no_such_pipeline(source: str) -> None:
    """Neither a folder nor, without a network, on the hub."""
    with pytest.raises(UsageError, match="which is no folder here|there is no folder") as error:
        from_diffusers(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_channels": 3}, "takes 1 and returns 3"),
        ({"sample_size": None}, "has no sample_size"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep' is not supported"),
    ],
)
def test_refused_networks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DiffusersDenoiser(tiny_unet(**options), diffusers.DDPMScheduler())


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.LCMScheduler(), "scheduler LCMScheduler is not supported: give one of DDIM"),
        (diffusers.CMStochasticIterativeScheduler(), "CMStochasticIterativeScheduler is not supported"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type 'continuous'"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas is not supported"),
        (
            diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            "prediction_type 'flow_prediction' is not supported here",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refused_schedulers(scheduler: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DiffusersDenoiser(tiny_unet(), scheduler)


def test_a_table_of_times_is_refused() -> None:
    """It has nothing between its steps."""
    network = diffusers.UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        time_embedding_type="learned", num_train_timesteps=10,
    )  # fmt: skip
    with pytest.raises(UsageError, match="embeds its times by a table"):
        DiffusersDenoiser(network, diffusers.DDPMScheduler(num_train_timesteps=10))


def test_refused_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="network Linear is not supported"):
        from_diffusers((nn.Linear(2, 2), diffusers.DDPMScheduler()))
    with pytest.raises(UsageError, match="Linear has no unet or transformer"):
        from_diffusers(nn.Linear(2, 2))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match=r"pip install 'vardistill\[diffusers\]'"):
        from_diffusers(tmp_path)


@pytest.mark.parametrize("source", ["nowhere", "runs/no/such/folder"])
def test_what_is_neither_a_folder_nor_an_id_is_refused_without_a_network(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UsageError, match=f"there is no folder {source}$"):
        from_diffusers(source)
