"""A diffusion model of pictures, or a student of one that makes them in one step or a few, for diffusers.

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    pictures = pipeline(batch_size=16).images

The start is Gaussian noise of the first noise level. A diffusion model then takes the scheduler's own steps; a student
predicts the picture x at each of its levels, x_t = alpha x + sigma noise, and adds fresh noise before the next.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class ImagePipeline(DiffusionPipeline):
    """Pictures from noise.

    Args:
        scheduler: of diffusers.
        unet: the network, or
        transformer: the network.
        classes: labels 0..classes − 1 that it takes; 0 for an unconditional one.
        steps: default of `num_inference_steps`; a student's own number.
        latents: whether it makes an autoencoder's latents; of neither one channel nor three it always does.
        student: None for a diffusion model; of a student `scale`, of the noise that it starts from, and `levels`, the
            time, alpha and sigma of each step, where the time is a discrete scheduler's step and sigma for others.
    """

    _optional_components = ["unet", "transformer"]
    model_cpu_offload_seq = "unet->transformer"

    def __init__(
        self,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        classes: int = 0,
        steps: int = 50,
        latents: bool = False,
        student: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer)
        self.register_to_config(classes=classes, steps=steps, latents=latents, student=student)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        class_labels: torch.Tensor | list[int] | int | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Draw pictures.

        Args:
            batch_size: their number.
            generator: fixes them.
            num_inference_steps: evaluations of the network; a student has its own number and no other.
            class_labels: one for all pictures, or one for each; default all classes in turn.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), in [0, 1]; "latent" for what the network makes.
                Default "pil", and for latents "latent", which is the only one.
            return_dict: an object with the attribute `images`, rather than a tuple.
        """
        network, device = self.unet or self.transformer, self._execution_device
        labels = self.labels(class_labels, batch_size, device)
        steps = num_inference_steps or self.config.steps
        if self.config.student is not None and steps != self.config.steps:
            raise ValueError(f"the student makes a picture in {self.config.steps} steps, not in {steps}")
        size, channels = network.config.sample_size, network.config.in_channels
        latents = self.config.latents or channels not in (1, 3)
        output_type = output_type or ("latent" if latents else "pil")
        if latents and output_type != "latent":
            raise ValueError(f"the network makes latents of {channels} channels, not pictures: use 'latent'")
        shape = (batch_size, channels, *((size, size) if isinstance(size, int) else size))

        def noise() -> torch.Tensor:
            return randn_tensor(shape, generator=generator, device=device, dtype=network.dtype)

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return network(x, timestep=t.expand(batch_size), class_labels=labels, return_dict=False)[0][:, :channels]

        few = self.config.student is not None
        x = self.few_steps(noise, predict) if few else self.many_steps(steps, noise, predict)
        images = x if output_type == "latent" else self.pictures(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def many_steps(self, steps: int, noise: Any, predict: Any) -> torch.Tensor:
        """A sample by the scheduler's own steps."""
        self.scheduler.set_timesteps(steps, device=self._execution_device)
        x = (self.scheduler.sigmas[0] if hasattr(self.scheduler, "sigmas") else 1.0) * noise()
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            x = self.scheduler.step(predict(scaled, t), t, x).prev_sample
        return x

    def few_steps(self, noise: Any, predict: Any) -> torch.Tensor:
        """A student's sample: x, noise, x, noise, ..., x."""
        scale, levels = self.config.student["scale"], self.config.student["levels"]
        x = torch.zeros(())
        for k, (time, alpha, sigma) in enumerate(self.progress_bar(levels)):
            x_t = alpha * x + sigma * noise() if k else scale * noise()
            x = self.clean(x_t, time, predict)
        return x

    def clean(self, x_t: torch.Tensor, time: float, predict: Any) -> torch.Tensor:
        """The picture predicted from x_t, as the scheduler understands the network."""
        scheduler, t = self.scheduler, torch.tensor(time, device=x_t.device)
        if hasattr(scheduler, "precondition_outputs"):  # EDM
            prediction = predict(scheduler.precondition_inputs(x_t, time), scheduler.precondition_noise(t))
            return scheduler.precondition_outputs(x_t, prediction, time)
        if hasattr(scheduler, "scale_noise"):  # rectified flow, whose network predicts noise − x
            return x_t - time * predict(x_t, scheduler.config.num_train_timesteps * t)
        scheduler.set_timesteps(1, device=x_t.device)
        return scheduler.step(predict(x_t, t), time, x_t).pred_original_sample

    def labels(self, given: Any, batch_size: int, device: torch.device) -> torch.Tensor | None:
        """(batch_size,) labels for a conditional network."""
        classes = self.config.classes
        if not classes:
            if given is not None:
                raise ValueError("the model is unconditional: it takes no class_labels")
            return None
        if given is None:
            given = torch.arange(batch_size) % classes
        labels = torch.as_tensor(given, device=device).expand(batch_size)
        if not ((labels >= 0) & (labels < classes)).all():
            raise ValueError(f"class_labels must be in [0, {classes}), but are {labels.tolist()}")
        return labels

    def pictures(self, x: torch.Tensor, output_type: str) -> Any:
        """From [−1, 1] to pictures."""
        images = (x / 2 + 0.5).clamp(0, 1).float().cpu()
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays
