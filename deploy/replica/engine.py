"""Runs a generator on one device. Pads batches to a few sizes, which are compiled and warmed up in advance."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import AutoencoderTiny

from meanflow_core.autoencoder import allow_tf32, decode_latents, decode_preview, forbid_tf32
from meanflow_core.pipeline import MeanFlowPipeline, OnStep
from meanflow_core.sampling import noise_between, noise_from_seeds

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ImageSpec:
    """One image to generate."""

    label: int
    seed: int
    seed_end: int | None = None
    """If set, the initial noise is interpolated between that of `seed` and that of `seed_end`."""
    weight: float = 0.0
    """Interpolation weight of `seed_end`, in [0, 1]."""
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    on_partial: Callable[[int, np.ndarray], None] | None = field(default=None, compare=False)
    """Called in the engine's thread with each partial image: its 0-based number, and uint8 (H, W, 3)."""


@dataclass(frozen=True)
class BatchOptions:
    """Options that all images of a batch share."""

    timesteps: tuple[float, ...]
    """From 1.0 down to 0.0."""
    is_preview: bool = False
    """Decode with the preview decoder."""
    num_partial: int = 0
    """Partial images to decode on the way, evenly spread over the steps. Fewer than the steps."""

    @property
    def partial_steps(self) -> list[int]:
        """1-based numbers of the steps after which partial images are decoded."""
        num_steps = len(self.timesteps) - 1
        parts = self.num_partial + 1
        return [round(part * num_steps / parts) for part in range(1, parts)]


@dataclass(frozen=True)
class BatchTiming:
    """Seconds that a batch spent in the network and in the decoder. Decoding partial images counts as network time."""

    model_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Batch:
    """Generated images."""

    images: np.ndarray
    """uint8 (B, H, W, 3)."""
    timing: BatchTiming


class Engine:
    """Generates batches of images. Not thread-safe: run it from one thread."""

    def __init__(
        self,
        pipeline: MeanFlowPipeline,
        *,
        precision: str = "float32",
        preview_decoder: AutoencoderTiny | None = None,
        compiled: bool = False,
        batch_sizes: Sequence[int] = (),
        max_batch_size: int = 16,
    ) -> None:
        """batch_sizes: a batch is padded to the next of these sizes (default: no padding).

        compiled: use torch.compile, which compiles one graph per batch size.
        """
        self.pipeline = pipeline
        self._device = pipeline.device  # looked up once: diffusers walks through all modules
        self.preview_decoder = preview_decoder
        self.batch_sizes = tuple(sorted(batch_sizes))
        self.max_batch_size = max_batch_size
        self.max_size_that_fits: int | None = None
        """Largest batch to try after one ran out of device memory; None before that."""
        self.num_out_of_memory = 0
        (allow_tf32 if precision == "tf32" else forbid_tf32)()
        dtype = PRECISIONS[precision]
        for module in (pipeline.transformer, pipeline.vae, preview_decoder):
            if module is not None:
                # diffusers' own `to` warns about modules that must stay in float32, even if the model has no such modules.
                torch.nn.Module.to(module, self._device, dtype)
        for decoder in (pipeline.vae, preview_decoder):
            if decoder is not None:
                # Convolutions are faster in channels_last format, on tensor cores and on CPUs.
                decoder.to(memory_format=torch.channels_last)
        if compiled:
            # Each module compiles a graph per batch size. Guided flow matching also runs batches of twice the size.
            torch._dynamo.config.recompile_limit = max(8, 4 * len(self.batch_sizes))
            pipeline.transformer.compile_repeated_blocks(dynamic=False)
            pipeline.vae.decoder.compile(dynamic=False)

    def padded_size(self, num_images: int) -> int:
        """Batch size for this number of images, padding included."""
        size = next((size for size in self.batch_sizes if size >= num_images), num_images)
        max_size = self.max_size_that_fits  # read once: a concurrent model swap may reset it
        return size if max_size is None or size <= max_size else num_images

    def warm_up(self) -> None:
        """Runs each batch size once, so that no request waits for a first run."""
        options = BatchOptions((1.0, 0.0))
        for size in self.batch_sizes or {1, self.max_batch_size}:
            self.run(options, [ImageSpec(0, seed) for seed in range(size)])
        if self.preview_decoder is not None:
            self.run(BatchOptions((1.0, 0.0), is_preview=True), [ImageSpec(0, 0)])

    def run(self, options: BatchOptions, specs: Sequence[ImageSpec]) -> Batch:
        """Generates the images in the order of `specs`.

        If a batch runs out of device memory, this batch and later ones are split into parts of at most half its size.
        Raises torch.OutOfMemoryError if a single image does not fit.
        """
        parts: list[Batch] = []
        done = 0
        while done < len(specs):
            part = specs[done : done + (self.max_size_that_fits or len(specs))]
            batch = self._run_if_it_fits(options, part)
            if batch is None:
                self.num_out_of_memory += 1
                half = self.padded_size(len(part)) // 2
                # Prefer a size that has already run, because only those are compiled.
                self.max_size_that_fits = max((size for size in self.batch_sizes if size <= half), default=half)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            parts.append(batch)
            done += len(part)
        timing = BatchTiming(
            sum(part.timing.model_seconds for part in parts), sum(part.timing.decode_seconds for part in parts)
        )
        return Batch(np.concatenate([part.images for part in parts]), timing)

    def _run_if_it_fits(self, options: BatchOptions, specs: Sequence[ImageSpec]) -> Batch | None:
        """Returns None if out of memory. Returning frees the traceback, which would keep the failed batch's tensors alive."""
        try:
            return self._run_one(options, specs)
        except torch.OutOfMemoryError:
            if self.padded_size(len(specs)) == 1:
                raise
        return None

    @torch.no_grad()
    def _run_one(self, options: BatchOptions, specs: Sequence[ImageSpec]) -> Batch:
        start = time.perf_counter()
        padded = [*specs, *[specs[-1]] * (self.padded_size(len(specs)) - len(specs))]
        pipeline = self.pipeline
        scales, intervals = None, None
        if pipeline.supports_guidance:
            config = pipeline.config
            scales = [config.guidance_scale if spec.guidance_scale is None else spec.guidance_scale for spec in padded]
            intervals = [
                spec.guidance_interval or (config.guidance_interval_start, config.guidance_interval_end)
                for spec in padded
            ]
        z = pipeline.sample_latents(
            [spec.label for spec in padded],
            self._noise(padded),
            timesteps=options.timesteps,
            guidance_scale=scales,
            guidance_interval=intervals,
            on_step=self._partial_images(options, specs) if options.num_partial else None,
        )
        self._synchronize()
        sampled = time.perf_counter()
        pixels = self._decode(options, z)[: len(specs)]
        return Batch(pixels, BatchTiming(sampled - start, time.perf_counter() - sampled))

    def _decode(self, options: BatchOptions, z: torch.Tensor) -> np.ndarray:
        """Decodes latents (B, C, H, W) to uint8 (B, H, W, 3)."""
        if options.is_preview:
            assert self.preview_decoder is not None
            images = decode_preview(self.preview_decoder, self.pipeline.vae, z)
        else:
            images = decode_latents(self.pipeline.vae, z)
        return images.cpu().numpy()

    def _partial_images(self, options: BatchOptions, specs: Sequence[ImageSpec]) -> OnStep:
        """Decodes after some of the steps, and hands each image to its spec."""
        steps = options.partial_steps

        def on_step(step: int, z: torch.Tensor) -> None:
            if step in steps:
                for spec, image in zip(specs, self._decode(options, z), strict=False):  # the rest is padding
                    if spec.on_partial is not None:
                        spec.on_partial(steps.index(step), image)

        return on_step

    def _noise(self, specs: Sequence[ImageSpec]) -> torch.Tensor:
        """Initial noise, float32 (B, C, H, W), interpolated between two seeds where a spec has both."""
        noise = noise_from_seeds([spec.seed for spec in specs], self.pipeline.latent_shape)
        between = [index for index, spec in enumerate(specs) if spec.seed_end is not None]
        if between:
            ends = noise_from_seeds([specs[index].seed_end or 0 for index in between], self.pipeline.latent_shape)
            noise[between] = noise_between(noise[between], ends, [specs[index].weight for index in between])
        return noise

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
