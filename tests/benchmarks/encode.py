"""How near the encode stage comes to a bare loop of the same autoencoder, and what decoding and memory cost.

    python tests/benchmarks/encode.py --json encode.json                # 200 images, an SD-sized autoencoder: half an hour
    python tests/benchmarks/encode.py --json encode.json --only memory --memory-images 2000 20000

- stage_over_bare: images per second of the whole stage (Ray Data, decoding, encoding, writing), from its first shard to
  its last, over those of one process that calls the same autoencoder on decoded tensors, on the same cores.
- decode: images per second of one core that reads, decodes and crops JPEGs of ImageNet's size.
- memory: the peak of the sum of PSS of all processes of a job, at two numbers of images.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _harness import main
from _harness import run_stage as run_job
from diffusers import AutoencoderKL
from PIL import Image

from meanflow_core.autoencoder import encode_moments
from pipelines.demo import images as demo_images
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.images.decoding import decode_image

# The configuration of sd-vae-ft-mse: 34 M parameters of encoder, 136 GMAC for a 256x256 image.
STABLE_DIFFUSION = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}
MEAN_IMAGENET_SIZE = (500, 375)  # of most of its photographs


def draw_photographs(folder: Path, count: int) -> None:
    """JPEGs as large, and about as detailed, as ImageNet's: 110 kB each."""
    generator = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"n{index % 4:08d}" / f"{index}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse, fine = (generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((12, 16), (188, 250)))
        layers = [
            Image.fromarray(layer).resize(MEAN_IMAGENET_SIZE, Image.Resampling.BICUBIC) for layer in (coarse, fine)
        ]
        Image.blend(*layers, 0.25).save(path, quality=92)


def run_stage(arguments: list[str], peak: list[float] | None = None) -> list[tuple[float, int]]:
    """(time, images done) at each shard of the stage's own command."""
    return run_job("pipelines.encode", "pipelines.encode", "encoded", arguments, peak)


def bare_images_per_second(vae: AutoencoderKL, pixels: np.ndarray, batch_size: int, batches: int) -> float:
    """One process, all cores, channels last, decoded images: the median over batches, after one to warm up."""
    vae = vae.to(memory_format=torch.channels_last)
    seconds = []
    for index in range(batches + 1):
        batch = torch.from_numpy(pixels[index * batch_size % len(pixels) :][:batch_size].copy())
        began = time.perf_counter()
        encode_moments(vae, batch).half()
        seconds.append((time.perf_counter() - began) / len(batch))
    return 1.0 / statistics.median(seconds[1:])


def measure_decode(folder: Path) -> dict[str, float]:
    """Reading, decoding and cropping, one core."""
    contents = [path.read_bytes() for path in sorted(folder.rglob("*.JPEG"))[:100]]
    seconds = []
    for content in contents:
        began = time.perf_counter()
        decode_image(content, 256)
        seconds.append(time.perf_counter() - began)
    return {
        "decode_images_per_second_and_core": 1.0 / statistics.median(seconds),
        "decode_mean_kilobytes": statistics.mean(map(len, contents)) / 1e3,
    }


def measure_stage(arguments: argparse.Namespace, folder: Path, work: Path) -> dict[str, float]:
    """The stage against the bare loop, before and after it, without mirror images."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**STABLE_DIFFUSION).eval().requires_grad_(False)
    vae.save_pretrained(work / "vae")
    pixels = np.stack([decode_image(path.read_bytes(), 256) for path in sorted(folder.rglob("*.JPEG"))[:48]])
    bare = [bare_images_per_second(vae, pixels, 8, arguments.bare_batches)]
    seen = run_stage(
        ["--images", str(folder), "--output", str(work / "latents"), "--vae", str(work / "vae"), "--no-mirror",
         "--rows-per-shard", "8"]
    )  # fmt: skip
    bare.append(bare_images_per_second(vae, pixels, 8, arguments.bare_batches))
    # While every encoder has work: before the first line they start and load the autoencoder, after the last but one they
    # run out of shards, of which a real dataset has thousands.
    (began, first), (ended, last) = seen[0], next(line for line in seen if line[1] >= 0.95 * arguments.images)
    stage = (last - first) / (ended - began)
    return {
        "bare_images_per_second": statistics.mean(bare),
        "stage_images_per_second": stage,
        "stage_over_bare": stage / statistics.mean(bare),
    }


def measure_memory(arguments: argparse.Namespace, work: Path) -> dict[str, float]:
    """The demo's autoencoder on the demo's images; each image stands in several class folders, by a hard link."""
    drawn = work / "drawn"
    demo_images.write_folder(drawn, num_train=2000, num_val=10)
    figures = {}
    for count in arguments.memory_images:
        folder = work / f"images-{count}"
        for index in range(count):
            source = (
                drawn / "train" / demo_images.wnid(index % 10) / f"{demo_images.wnid(index % 10)}_{index % 2000}.JPEG"
            )
            target = folder / source.parent.name / f"{index}.JPEG"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, target)
        peak: list[float] = []
        seen = run_stage(
            ["--images", str(folder), "--output", str(work / f"latents-{count}"), "--vae", str(SHIPPED_AUTOENCODER),
             "--image-size", "64", "--rows-per-shard", "64"], peak,  # or 2,000 would be over before all of it runs
        )  # fmt: skip
        figures[f"peak_gigabytes_at_{count}"] = peak[0]
        (began, first), (ended, last) = seen[0], seen[-1]
        figures[f"demo_images_per_second_at_{count}"] = (last - first) / (ended - began)
    first, last = arguments.memory_images[0], arguments.memory_images[-1]
    figures["peak_memory_growth"] = figures[f"peak_gigabytes_at_{last}"] / figures[f"peak_gigabytes_at_{first}"]
    return figures


def measure_gpu(arguments: argparse.Namespace) -> dict[str, float]:
    """Images per second of the bare autoencoder on a GPU, and its share of the peak."""
    torch.manual_seed(0)
    figures = {}
    for name, dtype in (("tf32", torch.float32), ("bfloat16", torch.bfloat16)):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        vae = AutoencoderKL(**STABLE_DIFFUSION).eval().requires_grad_(False).to("cuda", dtype)
        vae = vae.to(memory_format=torch.channels_last)
        batch = torch.randint(0, 256, (64, 256, 256, 3), dtype=torch.uint8, device="cuda")
        seconds = []
        for _ in range(12):
            torch.cuda.synchronize()
            began = time.perf_counter()
            encode_moments(vae, batch)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        rate = len(batch) / statistics.median(seconds[2:])
        figures[f"gpu_{name}_images_per_second"] = rate
        if arguments.peak_teraflops:
            figures[f"gpu_{name}_share_of_peak"] = rate * 2 * 136.4e9 / (arguments.peak_teraflops * 1e12)
    return figures


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """The figures that were asked for."""
    if "gpu" in arguments.only:
        return measure_gpu(arguments)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        draw_photographs(work / "photographs", arguments.images)
        if "decode" in arguments.only:
            figures |= measure_decode(work / "photographs")
        if "stage" in arguments.only:
            figures |= measure_stage(arguments, work / "photographs", work)
        if "memory" in arguments.only:
            figures |= measure_memory(arguments, work)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=200, help="photographs to encode")
    parser.add_argument("--bare-batches", type=int, default=4, help="of 8 images, before the stage and again after it")
    parser.add_argument("--only", nargs="+", default=["decode", "stage"], choices=["decode", "stage", "memory", "gpu"])
    parser.add_argument("--memory-images", type=int, nargs=2, default=[2000, 20_000])
    parser.add_argument("--peak-teraflops", type=float, help="of the GPU, for the share of it")
    main(measure, {"stage_over_bare": (">=", 0.85), "peak_memory_growth": ("<=", 1.15)}, parser)
