"""One loaded generator on one device: rows to images, in batches of sizes that the device has seen before."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderTiny

from meanflow_core.autoencoder import allow_tf32, decode_latents, decode_preview, forbid_tf32
from meanflow_core.pipeline import MeanFlowPipeline, noise_between, noise_from_seeds

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Row:
    """One image to make."""

    label: int
    seed: int
    seed_end: int | None = None
    """Where given, the noise lies between the two seeds'."""
    weight: float = 0.0
    """How far from `seed` to `seed_end`, in [0, 1]."""
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Group:
    """What the rows of one batch have in common."""

    timesteps: tuple[float, ...]
    """From 1.0 down to 0.0."""
    is_preview: bool = False
    """Decoded by the small decoder."""


@dataclass(frozen=True)
class BatchTimes:
    """Where a batch's time went, in seconds."""

    model_seconds: float
    decode_seconds: float


class Engine:
    """Makes images of rows. One caller at a time: whoever runs it holds it."""

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
        """batch_sizes: where given, a batch is filled up to the next of these sizes by repeating a row; compiled code
        exists for these alone. Without them a batch has the size that it has. compiled: torch.compile.
        """
        self.pipeline = pipeline
        self._device = pipeline.device  # diffusers walks through all modules for it
        self.preview_decoder = preview_decoder
        self.batch_sizes = tuple(sorted(batch_sizes))
        self.max_batch_size = max_batch_size
        self.largest_that_fits: int | None = None
        """Rows of the largest batch after one did not fit into the device's memory; None until then."""
        self.num_out_of_memory = 0
        """How often a batch did not fit."""
        self._turn = threading.Lock()
        (allow_tf32 if precision == "tf32" else forbid_tf32)()
        dtype = PRECISIONS[precision]
        for module in (pipeline.transformer, pipeline.vae, preview_decoder):
            if module is not None:
                # diffusers' own `to` warns of modules that none of these has.
                torch.nn.Module.to(module, self._device, dtype)
        for decoder in (pipeline.vae, preview_decoder):
            if decoder is not None:
                # Convolutions are quicker with the channels last, on tensor cores and on CPUs.
                decoder.to(memory_format=torch.channels_last)
        if compiled:
            # Guided flow matching runs twice the rows; each size of each module is a graph of its own.
            torch._dynamo.config.recompile_limit = max(8, 4 * len(self.batch_sizes))
            pipeline.transformer.compile_repeated_blocks(dynamic=False)
            pipeline.vae.decoder.compile(dynamic=False)

    def padded_size(self, num_rows: int) -> int:
        """The size of the batch that these rows are run in."""
        size = next((size for size in self.batch_sizes if size >= num_rows), num_rows)
        largest = self.largest_that_fits  # once: another thread may set it to None
        return size if largest is None or size <= largest else num_rows

    def warm_up(self) -> None:
        """Runs every size of batch once, so that no request pays for a first call."""
        group = Group((1.0, 0.0))
        for size in self.batch_sizes or {1, self.max_batch_size}:
            self.run(group, [Row(0, seed) for seed in range(size)])
        if self.preview_decoder is not None:
            self.run(Group((1.0, 0.0), is_preview=True), [Row(0, 0)])

    def run(self, group: Group, rows: Sequence[Row]) -> tuple[np.ndarray, BatchTimes]:
        """Images uint8 (B, H, W, 3) of the rows, in their order.

        Where a batch does not fit into the device's memory, it is halved, and so are those after it. Raises
        torch.OutOfMemoryError where a single row does not fit.
        """
        with self._turn:
            return self._run_in_parts(group, rows)

    def _run_in_parts(self, group: Group, rows: Sequence[Row]) -> tuple[np.ndarray, BatchTimes]:
        images: list[np.ndarray] = []
        model_seconds = decode_seconds = 0.0
        done = 0
        while done < len(rows):
            part = rows[done : done + (self.largest_that_fits or len(rows))]
            made = self._run_if_it_fits(group, part)
            if made is None:
                self.num_out_of_memory += 1
                half = self.padded_size(len(part)) // 2
                # A size that the device has seen before, where there is one: compiled code exists for these alone.
                self.largest_that_fits = max((size for size in self.batch_sizes if size <= half), default=half)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            images.append(made[0])
            model_seconds += made[1].model_seconds
            decode_seconds += made[1].decode_seconds
            done += len(part)
        return np.concatenate(images), BatchTimes(model_seconds, decode_seconds)

    def _run_if_it_fits(self, group: Group, rows: Sequence[Row]) -> tuple[np.ndarray, BatchTimes] | None:
        """None where it does not fit: by then the failed batch's tensors are gone, which its traceback kept alive."""
        try:
            return self._run_one(group, rows)
        except torch.OutOfMemoryError:
            if self.padded_size(len(rows)) == 1:
                raise
        return None

    @torch.no_grad()
    def _run_one(self, group: Group, rows: Sequence[Row]) -> tuple[np.ndarray, BatchTimes]:
        began = time.perf_counter()
        padded = [*rows, *[rows[-1]] * (self.padded_size(len(rows)) - len(rows))]
        pipeline = self.pipeline
        scales, intervals = self._guidance(padded)
        z = pipeline.sample_latents(
            [row.label for row in padded],
            self._noise(padded),
            timesteps=group.timesteps,
            guidance_scale=scales,
            guidance_interval=intervals,
        )
        self._synchronize()
        sampled = time.perf_counter()
        if group.is_preview:
            assert self.preview_decoder is not None
            images = decode_preview(self.preview_decoder, pipeline.vae, z)
        else:
            images = decode_latents(pipeline.vae, z)
        pixels = images[: len(rows)].cpu().numpy()
        return pixels, BatchTimes(sampled - began, time.perf_counter() - sampled)

    def _guidance(self, rows: Sequence[Row]) -> tuple[list[float] | None, list[tuple[float, float]] | None]:
        """Scale and interval of each row, the generator's own where it has none; None for a network without guidance."""
        own = self.pipeline.config
        if not self.pipeline.takes_guidance:
            return None, None
        scales = [own.guidance_scale if row.guidance_scale is None else row.guidance_scale for row in rows]
        return scales, [
            row.guidance_interval or (own.guidance_interval_start, own.guidance_interval_end) for row in rows
        ]

    def _noise(self, rows: Sequence[Row]) -> torch.Tensor:
        """Noise (B, C, H, W) of the rows' seeds."""
        noise = noise_from_seeds([row.seed for row in rows], self.pipeline.latent_shape)
        between = [index for index, row in enumerate(rows) if row.seed_end is not None]
        if between:
            ends = noise_from_seeds([rows[index].seed_end or 0 for index in between], self.pipeline.latent_shape)
            noise[between] = noise_between(noise[between], ends, [rows[index].weight for index in between])
        return noise

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
