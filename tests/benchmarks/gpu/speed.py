"""Times on one device: training steps, encoding, sampling, and batches as the endpoint runs them."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from _harness import synchronize
from diffusers import AutoencoderKL
from exactness import at_precision
from report import Figure, Setup
from step import (
    CHANNELS,
    CLASSES,
    FLOW_MATCHING,
    GUIDED,
    IDENTITY,
    SIZE,
    count_flops,
    count_step_flops,
    fresh_state,
    make_batch,
    whole_batch_loss,
)

from deploy.replica.engine import BatchOptions, Engine, ImageSpec
from meanflow_core.autoencoder import decode_latents, encode_moments
from meanflow_core.config import DiTConfig, ImprovedDiTConfig, NetworkConfig, TrainingConfig
from meanflow_core.generator import build_pipeline
from meanflow_core.networks.building import build_network
from meanflow_core.networks.interface import Conditioning
from meanflow_core.pipeline import MeanFlowPipeline
from meanflow_core.presets import preset_config
from meanflow_core.training import Batch, TrainState, compile_blocks, train_step
from pipelines.plan.hardware import GPUS


def peak_flops(precision: str) -> float | None:
    """FLOP/s of this GPU from its data sheet, if known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    return next((gpu.peak_teraflops[precision] * 1e12 for key, gpu in GPUS.items() if key in name), None)


def median_seconds(function: Callable[[], object], rounds: int = 5, warmup: int = 2) -> float:
    """Median seconds of a call."""
    seconds = []
    for number in range(warmup + rounds):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        if number >= warmup:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def peak_gigabytes(function: Callable[[], object]) -> float:
    """Peak memory of a call, everything that is allocated before included."""
    torch.cuda.reset_peak_memory_stats()
    function()
    synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def free_memory() -> None:
    """Returns the memory of deleted tensors, and of compiled graphs, to the device."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def networks(setup: Setup) -> dict[str, tuple[TrainingConfig, int]]:
    """{name: (training, images of a step)}."""
    if setup.is_toy:
        tiny = DiTConfig(patch_size=8, hidden_size=64, depth=2, num_heads=2)
        improved = ImprovedDiTConfig(patch_size=8, hidden_size=64, depth=2, num_heads=2, aux_head_depth=1)
        return {
            "tiny": (replace(preset_config("b2"), network=tiny), 4),
            "tiny improved": (replace(preset_config("imf_b2"), network=improved), 4),
        }
    return {
        "B/2": (preset_config("b2"), 256),
        "XL/2": (preset_config("xl2"), 64),
        "iMF-XL/2": (preset_config("imf_xl2"), 64),
    }


def regression_step(state: TrainState, batch: Batch, precision: str, device: str) -> None:
    """A step of flow matching on any network: its velocity is regressed onto v_t. Without clipping and moving averages."""
    draws, latents = batch.record.draws, batch.moments[:, :CHANNELS]
    t = draws.t.view(-1, 1, 1, 1)
    ones = torch.ones_like(draws.t)
    conditioning = Conditioning(
        t=draws.t,
        r=draws.t,
        labels=batch.labels,
        omega=ones,
        guidance_interval_start=0 * ones,
        guidance_interval_end=ones,
    )
    state.network.zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        output = state.network((1 - t) * latents + t * draws.noise, conditioning)
    target = draws.noise - latents
    heads = [value for value in (output.u, output.v) if value is not None]
    sum((head.float() - target).square().mean() for head in heads).backward()
    for optimizer in state.optimizers:
        optimizer.step()


def peer_step(state: TrainState, batch: Batch, precision: str, device: str) -> None:
    """A step of the same objective as public trainers arrange it: everything on the whole batch, and u once more.

    Without clipping and moving averages.
    """
    state.network.zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        loss = whole_batch_loss(state.network, batch, GUIDED, separate=True)
    loss.backward()
    for optimizer in state.optimizers:
        optimizer.step()


def training_steps(setup: Setup) -> Iterator[Figure]:
    """Seconds of a step with the preset's objective, over flow matching and over a public trainer's arrangement."""
    device = setup.device.type
    for name, (preset, rows) in networks(setup).items():
        is_improved = isinstance(preset.network, ImprovedDiTConfig)
        with torch.device("meta"):
            network = build_network(preset.network, sample_size=SIZE, in_channels=CHANNELS, num_classes=CLASSES)
        flops = count_step_flops(network, preset.loss, rows)
        for precision in ("bfloat16",) if setup.is_toy else ("tf32", "bfloat16"):
            config = replace(
                preset, global_batch_size=rows, precision=precision, derivative_precision="tf32", compile=False
            )
            state = fresh_state(config, device)
            batch = make_batch(config.loss, rows, device)
            ours = partial(train_step, state, state.network, [batch], IDENTITY, config)
            flow = partial(regression_step, state, make_batch(FLOW_MATCHING, rows, device), precision, device)
            peer = partial(peer_step, state, make_batch(GUIDED, rows, device), precision, device)
            with at_precision("tf32", setup.device):  # under autocast, of du/dt alone
                label = f"{name}, {rows} images, {precision}"
                seconds, plain = median_seconds(ours), median_seconds(flow)
                yield Figure(f"{label}: step", 1e3 * seconds, "ms")
                yield Figure(f"{label}: over flow matching", seconds / plain, "times")
                if peak_flops(precision) is not None:
                    yield Figure(f"{label}: share of peak", flops / seconds / peak_flops(precision))
                    yield Figure(f"{label}: memory", peak_gigabytes(ours), "GB")
                if not is_improved:
                    arranged = median_seconds(peer, rounds=3, warmup=1)
                    yield Figure(f"{label}: over a public trainer's arrangement", seconds / arranged, "times")
                compile_blocks(state.network, backend="aot_eager" if setup.is_toy else "inductor")
                yield Figure(f"{label}, compiled: step", 1e3 * (compiled := median_seconds(ours)), "ms")
                yield Figure(f"{label}, compiled: over flow matching", compiled / median_seconds(flow), "times")
            del state, ours, flow, peer
            free_memory()


def make_autoencoder(setup: Setup) -> AutoencoderKL:
    """Stable Diffusion's architecture with random weights; or a tiny one."""
    widths = (8, 8, 8, 8) if setup.is_toy else (128, 256, 512, 512)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=CHANNELS,
        norm_num_groups=min(widths[0], 32),
        scaling_factor=0.18215,
    )
    return vae.eval().requires_grad_(False).to(setup.device)


def encoding(setup: Setup) -> Iterator[Figure]:
    """Images per second of an SD-sized autoencoder's encoder at 256x256, and its decoder's."""
    rows, pixels = (2, 64) if setup.is_toy else (32, 256)
    images = torch.randint(256, (rows, pixels, pixels, 3), dtype=torch.uint8, device=setup.device)
    latents = torch.randn(rows, CHANNELS, pixels // 8, pixels // 8, device=setup.device)
    vae = make_autoencoder(setup)
    with torch.no_grad():
        flops = {
            "encode": count_flops(lambda: encode_moments(vae, images)),
            "decode": count_flops(lambda: vae.decode(latents)),
        }
    for precision in ("tf32", "bfloat16"):
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        vae = vae.to(dtype).to(memory_format=torch.channels_last)
        with at_precision("tf32" if precision == "tf32" else "float32", setup.device), torch.no_grad():
            for name, function in (
                ("encode", partial(encode_moments, vae, images)),
                ("decode", partial(decode_latents, vae, latents)),
            ):
                seconds = median_seconds(function)
                yield Figure(f"{name} {rows} images of {pixels}x{pixels}, {precision}", rows / seconds, "images/s")
                peak = peak_flops(precision)
                if peak is not None:
                    yield Figure(f"{name}, {precision}: share of peak", flops[name] / seconds / peak)


def make_pipeline(setup: Setup, config: NetworkConfig) -> MeanFlowPipeline:
    """A generator with random weights."""
    torch.manual_seed(0)
    network = build_network(config, sample_size=SIZE, in_channels=CHANNELS, num_classes=CLASSES).for_sampling().eval()
    names = [str(number) for number in range(CLASSES)]
    return build_pipeline(network, make_autoencoder(setup), names).to(setup.device)


def sampling(setup: Setup) -> Iterator[Figure]:
    """Images per second from noise to pixels in one network evaluation, batch by batch."""
    for name, (config, _) in networks(setup).items():
        pipeline = make_pipeline(setup, config.network)
        pipeline.set_progress_bar_config(disable=True)
        for precision in ("tf32", "bfloat16"):
            torch.nn.Module.to(pipeline.transformer, torch.bfloat16 if precision == "bfloat16" else torch.float32)
            torch.nn.Module.to(pipeline.vae, torch.bfloat16 if precision == "bfloat16" else torch.float32)
            with at_precision("tf32" if precision == "tf32" else "float32", setup.device):
                for rows in (1, 2) if setup.is_toy else (1, 64):
                    labels, seeds = [number % CLASSES for number in range(rows)], list(range(rows))
                    seconds = median_seconds(partial(pipeline.images_from_seeds, labels, seeds))
                    yield Figure(f"{name}, {precision}, batch of {rows}", rows / seconds, "images/s")
        del pipeline
        free_memory()


def engine_batches(setup: Setup) -> Iterator[Figure]:
    """Milliseconds of a batch as the endpoint runs it, network and decoder, copied to the host."""
    name, (config, _) = list(networks(setup).items())[0 if setup.is_toy else 1]
    for compiled in (False,) if setup.is_toy else (False, True):
        pipeline = make_pipeline(setup, config.network)
        sizes = (1, 2) if setup.is_toy else (1, 4, 16)
        engine = Engine(pipeline, batch_sizes=sizes, precision="bfloat16", compiled=compiled)
        engine.warm_up()
        for rows in sizes:
            specs = [ImageSpec(label=number, seed=number) for number in range(rows)]
            seconds = median_seconds(partial(engine.run, BatchOptions((1.0, 0.0)), specs))
            label = f"{name}, bfloat16{', compiled' if compiled else ''}, batch of {rows}"
            yield Figure(label, 1e3 * seconds, "ms")
        del engine, pipeline
        free_memory()


PARTS = {
    "Training steps": training_steps,
    "Autoencoder": encoding,
    "One-step sampling with decoder": sampling,
    "Batches of the endpoint": engine_batches,
}
