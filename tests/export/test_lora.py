"""LoRA files: pipelines of diffusers that load them, in a process without this library, take the student's own path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tiny_models import tiny_unet
from vardistill.denoisers import DiffusersDenoiser
from vardistill.errors import UsageError
from vardistill.export import export_lora
from vardistill.students import NetworkStudent

SCRIPT = """
import sys, torch, diffusers
from safetensors.torch import load_file, save_file
base, lora, out, kind, name = sys.argv[1:6]
given = load_file(f"{base}/given.safetensors")
if kind == "flow":
    network = diffusers.SD3Transformer2DModel.from_pretrained(f"{base}/network")
    pipeline = diffusers.StableDiffusion3Pipeline(
        network, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), *[None] * 7
    )
    call = {"prompt_embeds": given["encoder_hidden_states"], "pooled_prompt_embeds": given["pooled_projections"]}
else:
    network = diffusers.UNet2DConditionModel.from_pretrained(f"{base}/network")
    pipeline = diffusers.StableDiffusionPipeline(
        None, None, None, network, diffusers.DDIMScheduler(), None, None, requires_safety_checker=False
    )
    call = {"prompt_embeds": given["encoder_hidden_states"]}
pipeline.set_progress_bar_config(disable=True)
settings = {"latents": given["z"], "output_type": "latent", "height": 64, "width": 64, **eval(sys.argv[6])}
exec(sys.argv[7])
if name == "second":
    pipeline.load_lora_weights(lora, adapter_name="other")
    pipeline.set_adapters(["default_0", "other"], [0.5, 0.5])
torch.manual_seed(1)
made = pipeline(**call, **settings, generator=torch.Generator().manual_seed(1)).images
save_file({"x": made.contiguous()}, out)
assert "vardistill" not in sys.modules
"""


def denoiser(kind: str) -> DiffusersDenoiser:
    torch.manual_seed(0)
    if kind == "flow":
        network: Any = diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
            joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4,
            pos_embed_max_size=8,
        )  # fmt: skip
        return DiffusersDenoiser(network, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    network = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    prediction = {"epsilon": "epsilon", "v": "v_prediction"}[kind]
    return DiffusersDenoiser(
        network, diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction), latents=True
    )


def moved(kind: str, times: list[float]) -> NetworkStudent:
    student = NetworkStudent.from_teacher(denoiser(kind), times=times, rank=2)
    for name, p in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return student


TIMES = {
    "epsilon": [999 / 999, 700 / 999, 400 / 999, 100 / 999],
    "v": [999 / 999, 500 / 999],
    "flow": [1.0, 0.75, 0.5, 0.25],
}


def condition(kind: str) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)
    found = {"encoder_hidden_states": torch.randn(2, 5, 8, generator=rng)}
    return found | ({"pooled_projections": torch.randn(2, 8, generator=rng)} if kind == "flow" else {})


@pytest.mark.slow
@pytest.mark.parametrize("second", ["alone", "second"])
@pytest.mark.parametrize("kind", TIMES)
def test_the_printed_lines_make_a_pipeline_the_student(kind: str, second: str, tmp_path: Path) -> None:
    """To rounding; two halves of one LoRA beside each other are the whole."""
    student = moved(kind, TIMES[kind])
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    renoise = torch.randn(student.steps - 1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = student(z, renoise, **condition(kind))
    lora = tmp_path / "lora"
    *lines, last = export_lora(student, lora).splitlines()
    given = {"z": z, **condition(kind)}
    network: Any = denoiser(kind).network
    network.save_pretrained(tmp_path / "network")
    save_file(given, tmp_path / "given.safetensors")
    options = last.partition("prompt, ")[2].partition(").images")[0]
    words = [tmp_path, lora, tmp_path / "x.safetensors", kind, second, f"dict({options})", "\n".join(lines)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(load_file(tmp_path / "x.safetensors")["x"], expected, rtol=1e-4, atol=1e-4)


def test_what_fits_no_pipeline_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a LoRA file needs a student of adapters, and this one"):
        export_lora(NetworkStudent.from_teacher(denoiser("v")), tmp_path / "a")
    with pytest.raises(UsageError, match=r"starts at the time 1, but the student at 0\.5"):
        export_lora(NetworkStudent.from_teacher(denoiser("flow"), times=[0.5], rank=1), tmp_path / "b")
    with pytest.raises(UsageError, match="lies between two of the 1000 steps"):
        export_lora(NetworkStudent.from_teacher(denoiser("v"), times=[0.7123], rank=1), tmp_path / "c")
    edm = DiffusersDenoiser(tiny_unet(), diffusers.EDMEulerScheduler())
    with pytest.raises(UsageError, match="takes a student's path under EDMEulerScheduler"):
        export_lora(NetworkStudent.from_teacher(edm, rank=1), tmp_path / "d")
    assert not list(tmp_path.iterdir())
