"""MeanFlowPipeline: noise to image in n >= 1 network calls, as a diffusers pipeline.

A generator is a folder that `save_pretrained` writes: model_index.json, transformer/, vae/, scheduler/, safetensors
throughout. The latent normalisation stands in vae/config.json. Open it with `MeanFlowPipeline.from_pretrained`.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMapEulerDiscreteScheduler, ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

import meanflow_core.imf_transformer  # noqa: F401  # diffusers opens networks of imported modules alone
from meanflow_core.autoencoder import decode_latents, downsampling_factor
from meanflow_core.formats import require_known_format
from meanflow_core.transformer import Conditioning

FORMAT_VERSION = 1  # of a generator's folder; 0 had no number
MAX_SEED = 2**63 - 1
PREDICTIONS = ("average_velocity", "velocity")
SOLVERS = ("euler", "heun")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# One for all images, or one per image.
Scales = float | Sequence[float]
Intervals = tuple[float, float] | Sequence[tuple[float, float]]


def noise_from_seeds(seeds: Sequence[int], latent_shape: tuple[int, int, int]) -> torch.Tensor:
    """One standard normal (C, H, W) per seed, float32 (B, C, H, W), on the CPU: the same on every device and batch.

    Raises ValueError for a seed outside [0, 2^63 - 1].
    """
    if not seeds:
        raise ValueError("seeds must name at least one image, but got none")
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seeds must lie in [0, {MAX_SEED}], but got {seed}")
    return torch.stack([torch.randn(latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def noise_between(start: torch.Tensor, end: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Noise on the way from `start` (weight 0) to `end` (weight 1), all (B, C, H, W), a weight in [0, 1] per image.

    cos(w pi / 2) start + sin(w pi / 2) end: of independent standard normals again one, as the network knows it, where
    a straight line would pass through noise of half the variance.
    Raises ValueError where shapes or weights do not fit.
    """
    if start.shape != end.shape or len(weights) != len(start):
        raise ValueError(
            f"wanted two noises of one shape and a weight per image, but got {tuple(start.shape)}, {tuple(end.shape)} "
            f"and {len(weights)} weights"
        )
    if not all(0.0 <= weight <= 1.0 for weight in weights):
        raise ValueError(f"weights must lie in [0, 1], but got {list(weights)}")
    angle = torch.tensor(weights, dtype=torch.float64, device=start.device).mul(math.pi / 2.0).view(-1, 1, 1, 1)
    return angle.cos().to(start.dtype) * start + angle.sin().to(start.dtype) * end


def _as_output(pixels: torch.Tensor, output_type: str) -> object:
    if output_type == "pt":
        return pixels.permute(0, 3, 1, 2).float() / 255.0
    if output_type == "np":
        return pixels.cpu().numpy().astype("float32") / 255.0
    return [Image.fromarray(image) for image in pixels.cpu().numpy()]


def time_grid(num_inference_steps: int, timesteps: Sequence[float] | None = None) -> list[float]:
    """Times from 1 to 0: the given ones, or num_inference_steps equal steps.

    Raises ValueError for fewer than one step, or times that do not fall from 1 to 0.
    """
    if timesteps is None:
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, but got {num_inference_steps}")
        return torch.linspace(1.0, 0.0, num_inference_steps + 1, dtype=torch.float64).tolist()
    times = [float(time) for time in timesteps]
    falls = all(later < earlier for earlier, later in itertools.pairwise(times))
    if len(times) < 2 or times[0] != 1.0 or times[-1] != 0.0 or not falls:
        raise ValueError(f"timesteps must fall from 1.0 to 0.0, both included, but got {times}")
    return times


class MeanFlowPipeline(DiffusionPipeline):
    """Class-conditional images in one network call, or in several.

    id2label: {class id: name}, the id as a string because JSON has no other keys; a name may list synonyms, separated
    by commas, and each of them finds the class. wnids: {class id: WordNet id}, likewise, where there are any.
    prediction: "average_velocity" of MeanFlow, or "velocity" of flow matching, which is integrated by Euler's or Heun's
    method. guidance_scale, guidance_interval_start, guidance_interval_end: the defaults for sampling, for a network
    with guidance inputs and for flow matching. format_version: of the folder that it was opened from; it is written in this
    release's.

    Raises ValueError for a folder that a later release wrote.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: ModelMixin,
        vae: AutoencoderKL,
        scheduler: FlowMapEulerDiscreteScheduler,
        id2label: dict[str, str] | None = None,
        wnids: dict[str, str] | None = None,
        prediction: str = "average_velocity",
        guidance_scale: float = 1.0,
        guidance_interval_start: float = 0.0,
        guidance_interval_end: float = 1.0,
        format_version: int = FORMAT_VERSION,
    ) -> None:
        super().__init__()
        require_known_format(format_version, FORMAT_VERSION, "the generator in the folder")
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
            format_version=FORMAT_VERSION,
        )

    @property
    def class_names(self) -> dict[int, str]:
        """{class id: name}, in the order of the ids; empty where the generator was saved without names."""
        return {int(key): name for key, name in sorted(self.config.id2label.items(), key=lambda item: int(item[0]))}

    def get_label_ids(self, names: str | Sequence[str]) -> list[int]:
        """Class ids of class names (or of any comma-separated synonym).

        Raises ValueError for an unknown name, or for one that several classes share.
        """
        known: dict[str, list[int]] = {}
        for label, synonyms in self.class_names.items():
            for synonym in synonyms.split(","):
                known.setdefault(synonym.strip().lower(), []).append(label)
        ids = []
        for name in [names] if isinstance(names, str) else names:
            found = known.get(name.strip().lower(), [])
            if len(found) > 1:
                raise ValueError(f"class name {name!r} is shared by the ids {found}; name the id")
            if not found:
                some = ", ".join(list(known)[:10])
                raise ValueError(
                    f"unknown class name {name!r}; {len(known)} are known: {some}{', ...' * (len(known) > 10)}"
                )
            ids.append(found[0])
        return ids

    def check_labels(self, class_labels: Sequence[int]) -> list[int]:
        """The class ids as integers. Raises ValueError for no id, one that is no integer, or outside [0, num_classes - 1]."""
        num_classes = self.transformer.config.num_classes
        if len(class_labels) == 0:
            raise ValueError("class_labels must name at least one class, but got none")
        try:
            ids = [operator.index(label) for label in class_labels]
        except TypeError as error:
            raise ValueError(
                f"class ids must be whole numbers, but got {class_labels}; names go through get_label_ids"
            ) from error
        for label in ids:
            if not 0 <= label < num_classes:
                raise ValueError(f"class ids must lie in [0, {num_classes - 1}], but got {label}")
        return ids

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents that the network sees."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.latent_shape[1] * downsampling_factor(self.vae)

    @property
    def takes_guidance(self) -> bool:
        """Whether guidance can be asked for: with MeanFlow's plain network it is built into the weights."""
        return self.config.prediction == "velocity" or self.transformer.takes_guidance

    def _guidance(
        self, num_rows: int, scale: Scales | None, interval: Intervals | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The guidance scales, and the starts and the ends of the intervals, each float32 (B,).

        Raises ValueError for invalid guidance.
        """
        scales = torch.as_tensor(
            self.config.guidance_scale if scale is None else scale, dtype=torch.float32, device="cpu"
        )
        if not self.takes_guidance and (interval is not None or bool((scales != 1.0).any())):
            raise ValueError(
                f"this generator's guidance is built into its weights; leave guidance_scale and guidance_interval out, "
                f"but got {scale} and {interval}"
            )
        if scales.dim() > 1 or (scales.dim() == 1 and len(scales) != num_rows):
            raise ValueError(f"guidance_scale must be one number, or one per image, {num_rows}, but got {scale}")
        if not bool((torch.isfinite(scales) & (scales >= 1.0)).all()):
            raise ValueError(f"guidance_scale must be at least 1 (no guidance), but got {scales.tolist()}")
        own = (self.config.guidance_interval_start, self.config.guidance_interval_end)
        intervals = torch.as_tensor(own if interval is None else interval, dtype=torch.float32, device="cpu")
        if intervals.shape not in ((2,), (num_rows, 2)):
            raise ValueError(
                f"guidance_interval must be (start, end), or one per image, {num_rows}, but got {interval}"
            )
        starts, ends = intervals.expand(num_rows, 2).clone().unbind(dim=1)
        if not bool(((starts >= 0.0) & (starts <= ends) & (ends <= 1.0)).all()):
            raise ValueError(
                f"guidance_interval must be (start, end), 0 <= start <= end <= 1, but got {interval or own}"
            )
        return scales.expand(num_rows).clone(), starts, ends

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
    ) -> torch.Tensor:
        """Carries noise (B, C, H, W) at t = 1 to normalised latents, float32, at t = 0.

        Arguments as in a call of the pipeline. Source: Geng et al. 2025, Eq. 12: z_r = z_t - (t - r) u(z_t, r, t).
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
        learns_velocity = self.config.prediction == "velocity"
        if solver != "euler" and not learns_velocity:
            raise ValueError(f"solver {solver} integrates a velocity, but this generator gives average velocities")
        device = self._execution_device
        labels = torch.tensor(class_labels, device=device)
        guidance = self._guidance(len(labels), guidance_scale, guidance_interval)
        make_answer = self._velocity if learns_velocity else self._average_velocity
        answer = make_answer(labels, *(values.to(device) for values in guidance))

        z = noise.to(device, torch.float32)
        self.scheduler.set_timesteps(sigmas=times[:-1])
        scale = self.scheduler.config.num_train_timesteps
        for t, r in itertools.pairwise(times):
            u = answer(z, t, r)
            if solver == "heun":
                u = (u + answer(z - (t - r) * u, r, r)) / 2.0
            z = self.scheduler.step(u, t * scale, z, r_timestep=r * scale).prev_sample
        return z

    def _average_velocity(
        self, labels: torch.Tensor, scales: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
    ) -> Callable[[torch.Tensor, float, float], torch.Tensor]:
        """u(z, t, r) of these images, float32 (B, C, H, W)."""

        def answer(z: torch.Tensor, t: float, r: float) -> torch.Tensor:
            conditioning = Conditioning(
                t=torch.full_like(scales, t),
                r=torch.full_like(scales, r),
                labels=labels,
                omega=scales,
                guidance_interval_start=starts,
                guidance_interval_end=ends,
            )
            return self.transformer(z.to(self.transformer.dtype), conditioning).u.float()

        return answer

    def _velocity(
        self, labels: torch.Tensor, scales: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
    ) -> Callable[[torch.Tensor, float, float], torch.Tensor]:
        """v(z, t) of these images, each by classifier-free guidance inside its interval, float32 (B, C, H, W)."""
        null = torch.full_like(labels, self.transformer.config.num_classes)
        scale = scales.view(-1, 1, 1, 1)

        def answer(z: torch.Tensor, t: float, r: float) -> torch.Tensor:
            guided_rows = (scales != 1.0) & (starts <= t) & (t <= ends)
            is_guided = bool(guided_rows.any())
            asked = torch.cat([labels, null]) if is_guided else labels
            time = torch.full((len(asked),), t, device=z.device)
            z = torch.cat([z, z]) if is_guided else z
            conditioning = Conditioning(t=time, r=time, labels=asked)
            velocity = self.transformer(z.to(self.transformer.dtype), conditioning).velocity.float()
            if not is_guided:
                return velocity
            conditional, unconditional = velocity.chunk(2)
            guided = unconditional + scale * (conditional - unconditional)
            return torch.where(guided_rows.view(-1, 1, 1, 1), guided, conditional)

        return answer

    def _noise(self, class_labels: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """Noise (B, C, H, W) of a seed per image."""
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
        """Images uint8 (B, H, W, 3) on the pipeline's device, image i a function of (weights, class, seed, steps) alone.

        Arguments as in a call of the pipeline. Raises ValueError for labels, seeds or steps that do not fit.
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
        """One image per class label.

        The noise comes from `latents` (B, C, H, W), or from `seeds`, one per image, so that an image is a function of
        (weights, class, seed, steps) and not of its batch, or from `generator` as elsewhere in diffusers.
        num_inference_steps: equal steps from t = 1 to 0; timesteps, e.g. (1.0, 0.4, 0.0), takes the place of them.
        guidance_scale and guidance_interval (start, end), one or one per image: for improved MeanFlow, which is told
        them, and for flow matching, at twice the calls; the generator's own unless given. solver: "euler", or "heun"
        for flow matching, at two calls a step. output_type: "pil", "np" (float [0, 1] (B, H, W, 3)), "pt" (float
        [0, 1] (B, 3, H, W)), or "latent" (normalised latents (B, C, H, W)).
        Raises ValueError for labels, steps, times, seeds, guidance or latents that do not fit.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, but got {output_type!r}")
        if sum(source is not None for source in (generator, seeds, latents)) > 1:
            raise ValueError("give at most one of generator, seeds and latents")
        class_labels = self.check_labels(class_labels)
        if seeds is not None:
            latents = self._noise(class_labels, seeds)
        elif latents is None:
            shape = (len(class_labels), *self.latent_shape)
            latents = randn_tensor(shape, generator, self._execution_device, torch.float32)
        z = self.sample_latents(
            class_labels, latents, num_inference_steps, timesteps, guidance_scale, guidance_interval, solver
        )
        images = z if output_type == "latent" else _as_output(decode_latents(self.vae, z), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
