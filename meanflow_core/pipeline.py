"""MeanFlowPipeline: a diffusers pipeline that generates images from noise in one or more network evaluations.

A generator is the folder that `save_pretrained` writes: model_index.json, transformer/, vae/ and scheduler/, with all
weights in safetensors. The latent normalisation is part of vae/config.json.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

# diffusers finds network classes in imported modules only.
import meanflow_core.networks.dit
import meanflow_core.networks.forward_mode
import meanflow_core.networks.improved_dit  # noqa: F401
from meanflow_core.autoencoder import Autoencoder, decode_latents, downsampling_factor
from meanflow_core.formats import GENERATOR_FORMAT_VERSION, require_format_version
from meanflow_core.networks.interface import Conditioning
from meanflow_core.predictions import PREDICTIONS, needs_many_steps
from meanflow_core.sampling import fresh_noise, has_equal_steps, noise_from_seeds, time_grid

SOLVERS = ("euler", "heun")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

OnStep = Callable[[int, torch.Tensor], None]
"""Called after each step but the last: 1-based number of the step, and the image that it predicts, as latents at t = 0."""

_Predict = Callable[[torch.Tensor, float, float], torch.Tensor]  # (z, t, r) -> the network's prediction

# Guidance: one value for all images, or one per image.
Scales = float | Sequence[float]
Intervals = tuple[float, float] | Sequence[tuple[float, float]]


def _to_output(pixels: torch.Tensor, output_type: str, image_mode: str) -> object:
    if output_type == "pt":
        return pixels.permute(0, 3, 1, 2).float() / 255.0
    if output_type == "np":
        return pixels.cpu().numpy().astype("float32") / 255.0
    if image_mode == "L":
        return [Image.fromarray(image) for image in pixels[..., 0].cpu().numpy()]
    return [Image.fromarray(image) for image in pixels.cpu().numpy()]


class MeanFlowPipeline(DiffusionPipeline):
    """Generates class-conditional images in one or more network evaluations.

    Args:
        transformer: the network, on normalised latents.
        vae: the autoencoder; its config holds the latent normalisation.
        scheduler: computes the steps: FlowMapEulerDiscreteScheduler's z_r = z_t - (t - r) u, or for epsilon DDIMScheduler.
        id2label: {class id: name}, with the id as a string, as JSON requires. A name may list synonyms separated by
            commas, each of which finds the class.
        wnids: {class id: WordNet id}, if known.
        prediction: what the network predicts. "average_velocity": u(z_t, r, t), for MeanFlow and its relatives.
            "velocity": v(z_t, t), integrated by Euler's or Heun's method. "consistency": u(z_t, 0, t); each step predicts
            the image and adds fresh noise. "epsilon": the noise, for diffusion, sampled by the scheduler.
        guidance_scale, guidance_interval_start, guidance_interval_end: default guidance, for networks with guidance
            inputs (improved MeanFlow), for flow matching and for diffusion.
        network_class: the network's class, as "module:Class".
        format_version: format version of the generator folder.

    Raises ValueError for an unknown prediction or another format version.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: ModelMixin,
        vae: Autoencoder,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
        wnids: dict[str, str] | None = None,
        prediction: str = "average_velocity",
        guidance_scale: float = 1.0,
        guidance_interval_start: float = 0.0,
        guidance_interval_end: float = 1.0,
        network_class: str | None = None,
        format_version: int = GENERATOR_FORMAT_VERSION,
    ) -> None:
        super().__init__()
        require_format_version(format_version, GENERATOR_FORMAT_VERSION, "the generator")
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, but got {prediction!r}")
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(
            id2label=dict(id2label or {}),
            wnids=dict(wnids or {}),
            prediction=prediction,
            guidance_scale=guidance_scale,
            guidance_interval_start=guidance_interval_start,
            guidance_interval_end=guidance_interval_end,
            network_class=network_class,
            format_version=format_version,
        )

    @property
    def class_names(self) -> dict[int, str]:
        """{class id: name}, sorted by id; empty if the generator was saved without names."""
        return {int(key): name for key, name in sorted(self.config.id2label.items(), key=lambda item: int(item[0]))}

    def get_label_ids(self, names: str | Sequence[str]) -> list[int]:
        """Looks up the class ids of class names, or of any of their synonyms.

        Raises ValueError for an unknown name, or for a name that several classes share.
        """
        known: dict[str, list[int]] = {}
        for label, synonyms in self.class_names.items():
            for synonym in synonyms.split(","):
                known.setdefault(synonym.strip().lower(), []).append(label)
        ids = []
        for name in [names] if isinstance(names, str) else names:
            matches = known.get(name.strip().lower(), [])
            if len(matches) > 1:
                raise ValueError(f"class name {name!r} is shared by the ids {matches}; use the id")
            if not matches:
                some = ", ".join(list(known)[:10])
                raise ValueError(f"unknown class name {name!r}; some of the {len(known)} known names: {some}")
            ids.append(matches[0])
        return ids

    def check_labels(self, class_labels: Sequence[int]) -> list[int]:
        """Converts class ids to ints. Raises ValueError if there are none, or one is not a known class id."""
        num_classes = self.transformer.config.num_classes
        if len(class_labels) == 0:
            raise ValueError("class_labels must contain at least one class, but got none")
        try:
            ids = [operator.index(label) for label in class_labels]
        except TypeError as error:
            raise ValueError(
                f"class ids must be whole numbers, but got {class_labels}; look names up with get_label_ids"
            ) from error
        for label in ids:
            if not 0 <= label < num_classes:
                raise ValueError(f"class ids must lie in [0, {num_classes - 1}], but got {label}")
        return ids

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's latents."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.latent_shape[1] * downsampling_factor(self.vae)

    @property
    def image_mode(self) -> Literal["L", "RGB"]:
        """Pillow's mode of the images: "L" if the generator is grey."""
        return "L" if getattr(self.vae, "is_grey", False) else "RGB"

    @property
    def supports_guidance(self) -> bool:
        """Whether guidance can be set at sampling time. In plain MeanFlow it is built into the weights."""
        return needs_many_steps(self.config.prediction) or self.transformer.supports_guidance

    def _guidance(
        self, num_images: int, scale: Scales | None, interval: Intervals | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Guidance scale, interval start and interval end of each image, each float32 (B,).

        Raises ValueError for invalid guidance.
        """
        scales = torch.as_tensor(
            self.config.guidance_scale if scale is None else scale, dtype=torch.float32, device="cpu"
        )
        if not self.supports_guidance and (interval is not None or bool((scales != 1.0).any())):
            raise ValueError(
                f"this generator's guidance is built into its weights; omit guidance_scale and guidance_interval, "
                f"but got {scale} and {interval}"
            )
        if scales.dim() > 1 or (scales.dim() == 1 and len(scales) != num_images):
            raise ValueError(f"guidance_scale must be one number or {num_images}, one per image, but got {scale}")
        if not bool((torch.isfinite(scales) & (scales >= 1.0)).all()):
            raise ValueError(f"guidance_scale must be at least 1 (no guidance), but got {scales.tolist()}")
        default = (self.config.guidance_interval_start, self.config.guidance_interval_end)
        intervals = torch.as_tensor(default if interval is None else interval, dtype=torch.float32, device="cpu")
        if intervals.shape not in ((2,), (num_images, 2)):
            raise ValueError(
                f"guidance_interval must be (start, end) or {num_images}, one per image, but got {interval}"
            )
        starts, ends = intervals.expand(num_images, 2).clone().unbind(dim=1)
        if not bool(((starts >= 0.0) & (starts <= ends) & (ends <= 1.0)).all()):
            raise ValueError(
                f"guidance_interval must be (start, end), 0 <= start <= end <= 1, but got {interval or default}"
            )
        return scales.expand(num_images).clone(), starts, ends

    @torch.no_grad()
    def sample_latents(
        self,
        class_labels: Sequence[int],
        noise: torch.Tensor,
        num_inference_steps: int = 1,
        timesteps: Sequence[float] | None = None,
        guidance_scale: Scales | None = None,
        guidance_interval: Intervals | None = None,
        solver: str = "euler",
        on_step: OnStep | None = None,
    ) -> torch.Tensor:
        """Maps noise (B, C, H, W) at t = 1 to normalised latents, float32 (B, C, H, W), at t = 0.

        on_step: see OnStep. For the other arguments, see `__call__`.
        Source: Geng et al. 2025, Eq. 12: z_r = z_t - (t - r) u(z_t, r, t).
        """
        class_labels = self.check_labels(class_labels)
        times = time_grid(num_inference_steps, timesteps)
        if noise.shape != (len(class_labels), *self.latent_shape):
            raise ValueError(
                f"noise must have shape {(len(class_labels), *self.latent_shape)}, but got {tuple(noise.shape)}"
            )
        if not bool(torch.isfinite(noise).all()):
            raise ValueError("noise must be finite")
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, but got {solver!r}")
        prediction = self.config.prediction
        if solver != "euler" and prediction != "velocity":
            raise ValueError(
                f"solver {solver} requires a generator that predicts velocity, but this predicts {prediction}"
            )
        if prediction == "epsilon" and not has_equal_steps(times):
            raise ValueError(f"timesteps of a diffusion generator must be equally spaced, but got {times}")
        device = self._execution_device
        labels = torch.tensor(class_labels, device=device)
        guidance = [values.to(device) for values in self._guidance(len(labels), guidance_scale, guidance_interval)]
        predict = (self._guided_function if needs_many_steps(prediction) else self._average_velocity_function)(
            labels, *guidance
        )
        z = noise.to(device, torch.float32)
        if prediction == "epsilon":
            return self._denoise(predict, z, len(times) - 1, on_step)
        if prediction == "consistency":
            return self._sample_consistency(predict, z, times, on_step)
        return self._follow_flow(predict, z, times, solver, on_step)

    def _follow_flow(
        self, predict: _Predict, z: torch.Tensor, times: list[float], solver: str, on_step: OnStep | None
    ) -> torch.Tensor:
        """Steps z_r = z_t - (t - r) u along the times. A step predicts the image at the end of its straight line."""
        self.scheduler.set_timesteps(sigmas=times[:-1])
        scale = self.scheduler.config.num_train_timesteps
        for step, (t, r) in enumerate(itertools.pairwise(times)):
            u = predict(z, t, r)
            if solver == "heun":
                u = (u + predict(z - (t - r) * u, r, r)) / 2.0
            if on_step is not None and r > 0.0:
                on_step(step + 1, z - t * u)
            z = self.scheduler.step(u, t * scale, z, r_timestep=r * scale).prev_sample
        return z

    def _sample_consistency(
        self, predict: _Predict, z: torch.Tensor, times: list[float], on_step: OnStep | None
    ) -> torch.Tensor:
        """Predicts the image from z_t, and adds fresh noise up to the next time (Song et al. 2023, Algorithm 1)."""
        self.scheduler.set_timesteps(sigmas=times[:-1])
        scale, noise = self.scheduler.config.num_train_timesteps, z
        for step, (t, s) in enumerate(itertools.pairwise(times)):
            image = self.scheduler.step(predict(z, t, 0.0), t * scale, z, r_timestep=0.0).prev_sample
            if s == 0.0:
                z = image
            else:
                if on_step is not None:
                    on_step(step + 1, image)
                z = (1.0 - s) * image + s * fresh_noise(noise, step).to(z.device)
        return z

    def _denoise(self, predict: _Predict, z: torch.Tensor, num_steps: int, on_step: OnStep | None) -> torch.Tensor:
        """DDIM's steps with eta 0. Timestep k of K is t = (k + 1) / K for the network, as in training."""
        self.scheduler.set_timesteps(num_steps)
        num_timesteps = self.scheduler.config.num_train_timesteps
        timesteps = self.scheduler.timesteps.tolist()
        for step, (timestep, following) in enumerate(itertools.zip_longest(timesteps, timesteps[1:])):
            t = (timestep + 1) / num_timesteps
            epsilon = predict(z, t, t)
            z = self.scheduler.step(epsilon, timestep, z).pred_original_sample
            # Not the step's prev_sample: its noise level is not that of the next timestep unless num_steps divides K.
            if following is not None:
                if on_step is not None:
                    on_step(step + 1, z)
                z = self.scheduler.add_noise(z, epsilon, torch.tensor([following]))
        return z

    def _average_velocity_function(
        self, labels: torch.Tensor, scales: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
    ) -> _Predict:
        """Returns a function (z, t, r) -> u(z, t, r), float32 (B, C, H, W)."""

        def predict(z: torch.Tensor, t: float, r: float) -> torch.Tensor:
            conditioning = Conditioning(
                t=torch.full_like(scales, t),
                r=torch.full_like(scales, r),
                labels=labels,
                omega=scales,
                guidance_interval_start=starts,
                guidance_interval_end=ends,
            )
            return self.transformer(z.to(self.transformer.dtype), conditioning).average_velocity.float()

        return predict

    def _guided_function(
        self, labels: torch.Tensor, scales: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
    ) -> _Predict:
        """Returns a function (z, t, r) -> v(z, t) or the noise, float32 (B, C, H, W), guided in each image's interval."""
        null = torch.full_like(labels, self.transformer.config.num_classes)
        scale = scales.view(-1, 1, 1, 1)

        def predict(z: torch.Tensor, t: float, r: float) -> torch.Tensor:
            is_guided = (scales != 1.0) & (starts <= t) & (t <= ends)
            needs_null = bool(is_guided.any())
            classes = torch.cat([labels, null]) if needs_null else labels
            time = torch.full((len(classes),), t, device=z.device)
            z = torch.cat([z, z]) if needs_null else z
            conditioning = Conditioning(t=time, r=time, labels=classes)
            velocity = self.transformer(z.to(self.transformer.dtype), conditioning).velocity.float()
            if not needs_null:
                return velocity
            conditional, unconditional = velocity.chunk(2)
            guided = unconditional + scale * (conditional - unconditional)
            return torch.where(is_guided.view(-1, 1, 1, 1), guided, conditional)

        return predict

    def _noise(self, class_labels: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        if len(seeds) != len(class_labels):
            raise ValueError(f"seeds must be one per image, {len(class_labels)}, but got {len(seeds)}")
        return noise_from_seeds(seeds, self.latent_shape)

    def images_from_seeds(
        self,
        class_labels: Sequence[int],
        seeds: Sequence[int],
        num_inference_steps: int = 1,
        timesteps: Sequence[float] | None = None,
        guidance_scale: Scales | None = None,
        guidance_interval: Intervals | None = None,
        solver: str = "euler",
    ) -> torch.Tensor:
        """Generates images, uint8 (B, H, W, 3), on the pipeline's device.

        Image i depends only on the weights, its class, its seed and the sampling arguments. See `__call__` for the
        arguments and errors.
        """
        noise = self._noise(class_labels, seeds)
        z = self.sample_latents(
            class_labels, noise, num_inference_steps, timesteps, guidance_scale, guidance_interval, solver
        )
        return decode_latents(self.vae, z)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[int] | None = None,
        latents: torch.Tensor | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: Scales | None = None,
        guidance_interval: Intervals | None = None,
        solver: str = "euler",
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generates one image per class label.

        Args:
            class_labels: class ids.
            num_inference_steps: number of equal steps from t = 1 to t = 0.
            generator: random generator of the noise, as in other diffusers pipelines.
            seeds: one per image, instead of `generator`. An image then does not depend on the rest of its batch.
            latents: the noise, (B, C, H, W), instead of `generator` or `seeds`.
            timesteps: the times from 1 to 0, for example (1.0, 0.4, 0.0), instead of num_inference_steps. Diffusion only
                takes equal steps.
            guidance_scale, guidance_interval: scale and (start, end), one for all images or one per image, for improved
                MeanFlow, flow matching and diffusion (the latter two take two network evaluations per guided step).
                Default: the generator's.
            solver: "euler", or "heun" for flow matching (two network evaluations per step).
            output_type: "pil", in `image_mode`; "np", float (B, H, W, 3) in [0, 1]; "pt", float (B, 3, H, W) in [0, 1]; or
                "latent", normalised latents (B, C, H, W).
            return_dict: return an ImagePipelineOutput instead of a tuple.

        Raises ValueError for invalid arguments.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, but got {output_type!r}")
        if sum(source is not None for source in (generator, seeds, latents)) > 1:
            raise ValueError("pass at most one of generator, seeds and latents")
        class_labels = self.check_labels(class_labels)
        if seeds is not None:
            latents = self._noise(class_labels, seeds)
        elif latents is None:
            shape = (len(class_labels), *self.latent_shape)
            latents = randn_tensor(shape, generator, self._execution_device, torch.float32)
        z = self.sample_latents(
            class_labels, latents, num_inference_steps, timesteps, guidance_scale, guidance_interval, solver
        )
        images = z if output_type == "latent" else _to_output(decode_latents(self.vae, z), output_type, self.image_mode)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
