"""MeanFlowPipeline: noise to image in n >= 1 network calls, as a diffusers pipeline.

A generator is a folder that `save_pretrained` writes: model_index.json, transformer/, vae/, scheduler/, safetensors
throughout. The latent normalisation stands in vae/config.json. Open it with `MeanFlowPipeline.from_pretrained`.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMapEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from meanflow_core.autoencoder import decode_latents
from meanflow_core.transformer import Conditioning, MeanFlowDiT

MAX_SEED = 2**63 - 1


def noise_from_seeds(seeds: Sequence[int], latent_shape: tuple[int, int, int]) -> torch.Tensor:
    """One standard normal (C, H, W) per seed, float32 (B, C, H, W), on the CPU: the same on every device and batch.

    Raises ValueError for a seed outside [0, 2^63 - 1].
    """
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seeds must lie in [0, {MAX_SEED}], but got {seed}")
    return torch.stack([torch.randn(latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _as_output(pixels: torch.Tensor, output_type: str) -> object:
    if output_type == "pt":
        return pixels.permute(0, 3, 1, 2).float() / 255.0
    if output_type == "np":
        return pixels.cpu().numpy().astype("float32") / 255.0
    return [Image.fromarray(image) for image in pixels.cpu().numpy()]


class MeanFlowPipeline(DiffusionPipeline):
    """Class-conditional images in one network call, or in several.

    id2label: {class id: name}, the id as a string because JSON has no other keys; a name may list synonyms, separated
    by commas, and each of them finds the class.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: MeanFlowDiT,
        vae: AutoencoderKL,
        scheduler: FlowMapEulerDiscreteScheduler,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=dict(id2label or {}))

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

    def check_labels(self, class_labels: Sequence[int]) -> None:
        """Raises ValueError where a class id lies outside [0, num_classes - 1], or there are none."""
        num_classes = self.transformer.config.num_classes
        if not class_labels:
            raise ValueError("class_labels must name at least one class")
        for label in class_labels:
            if not 0 <= label < num_classes:
                raise ValueError(f"class ids must lie in [0, {num_classes - 1}], but got {label}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents that the network sees."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    @torch.no_grad()
    def sample_latents(
        self, class_labels: Sequence[int], noise: torch.Tensor, num_inference_steps: int
    ) -> torch.Tensor:
        """Carries noise (B, C, H, W) at t = 1 to normalised latents at t = 0 in equal steps, one network call each.

        Source: Geng et al. 2025, Eq. 12: z_r = z_t - (t - r) u(z_t, r, t).
        """
        self.check_labels(class_labels)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, but got {num_inference_steps}")
        if noise.shape != (len(class_labels), *self.latent_shape):
            raise ValueError(
                f"noise must have shape {(len(class_labels), *self.latent_shape)}, but got {tuple(noise.shape)}"
            )
        device, dtype = self._execution_device, self.transformer.dtype
        labels = torch.tensor(class_labels, device=device)
        z = noise.to(device, dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        scale = self.scheduler.config.num_train_timesteps
        times = self.scheduler.sigmas.tolist()
        for t, r in itertools.pairwise(times):
            conditioning = Conditioning(
                t=torch.full((len(labels),), t, device=device, dtype=dtype),
                r=torch.full((len(labels),), r, device=device, dtype=dtype),
                labels=labels,
            )
            u = self.transformer(z, conditioning).u
            z = self.scheduler.step(u, t * scale, z, r_timestep=r * scale).prev_sample
        return z

    def images_from_seeds(
        self, class_labels: Sequence[int], seeds: Sequence[int], num_inference_steps: int = 1
    ) -> torch.Tensor:
        """Images uint8 (B, H, W, 3) on the pipeline's device, image i a function of (weights, class, seed, steps) alone.

        Raises ValueError for labels, seeds or steps that do not fit.
        """
        if len(seeds) != len(class_labels):
            raise ValueError(f"seeds must be one per image, {len(class_labels)}, but got {len(seeds)}")
        noise = noise_from_seeds(seeds, self.latent_shape)
        return decode_latents(self.vae, self.sample_latents(class_labels, noise, num_inference_steps))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[int] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One image per class label.

        The noise comes from `latents` (B, C, H, W), or from `seeds`, one per image, so that an image is a function of
        (weights, class, seed, steps) and not of its batch, or from `generator` as elsewhere in diffusers.
        output_type: "pil", "np" (float [0, 1] (B, H, W, 3)), "pt" (float [0, 1] (B, 3, H, W)), or "latent" (normalised
        latents (B, C, H, W)).
        Raises ValueError for labels, steps, seeds or latents that do not fit.
        """
        known = ("pil", "np", "pt", "latent")
        if output_type not in known:
            raise ValueError(f"output_type must be one of {', '.join(known)}, but got {output_type!r}")
        if sum(source is not None for source in (generator, seeds, latents)) > 1:
            raise ValueError("give at most one of generator, seeds and latents")
        class_labels = [int(label) for label in class_labels]
        if seeds is not None:
            if len(seeds) != len(class_labels):
                raise ValueError(f"seeds must be one per image, {len(class_labels)}, but got {len(seeds)}")
            latents = noise_from_seeds(seeds, self.latent_shape)
        elif latents is None:
            shape = (len(class_labels), *self.latent_shape)
            latents = randn_tensor(shape, generator, self._execution_device, torch.float32)
        z = self.sample_latents(class_labels, latents, num_inference_steps)
        images = z if output_type == "latent" else _as_output(decode_latents(self.vae, z), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def build_pipeline(network: MeanFlowDiT, vae: AutoencoderKL, class_names: Sequence[str]) -> MeanFlowPipeline:
    """A pipeline around a network and its autoencoder, class i carrying the i-th name."""
    id2label = {str(label): name for label, name in enumerate(class_names)}
    pipeline = MeanFlowPipeline(network, vae, FlowMapEulerDiscreteScheduler(), id2label)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(folder: Path, device: str | torch.device = "cpu") -> MeanFlowPipeline:
    """Opens a generator's folder in float32 on a device: safetensors only, no progress bars, gradients off."""
    diffusers_logging.disable_progress_bar()  # of loading a handful of files
    pipeline = MeanFlowPipeline.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def find_generator(folder: Path) -> Path:
    """The generator in a folder: the folder itself, or the one below it that has a model_index.json.

    A model downloaded from a registry holds the generator among its other files. Raises ValueError where there is
    none, or several.
    """
    found = [path.parent for path in sorted(folder.rglob("model_index.json"))]
    if (folder / "model_index.json").is_file():
        return folder
    if len(found) != 1:
        raise ValueError(
            f"wanted a generator, a folder with a model_index.json, in {folder}, but found {len(found)}; "
            f"pipelines.train writes one and prints its place"
        )
    return found[0]
