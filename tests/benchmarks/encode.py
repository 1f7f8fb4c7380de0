"""Throughput and memory of the encode stage.

    python tests/benchmarks/encode.py --json encode.json    # 200 images, SD-sized autoencoder: half an hour on 2 cores
    python tests/benchmarks/encode.py --json encode.json --only memory --memory-images 2000 20000

- stage: images per second of the whole stage (Ray Data, decode, encode, write), divided by those of a plain loop that
  runs the same autoencoder on decoded images on the same cores.
- decode: images per second of one core that decodes and crops JPEGs of ImageNet's size.
- memory: peak memory (sum of PSS) of all processes of a job, at two numbers of images.
- gpu: images per second of the autoencoder alone on a GPU.
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

ENCODER_FLOPS = 2 * 136.4e9  # of sd-vae-ft-mse on a 256x256 image
# The configuration of sd-vae-ft-mse.
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
IMAGENET_IMAGE_SIZE = (500, 375)  # the most frequent one


def write_jpegs(folder: Path, count: int) -> None:
    """Writes JPEGs of about the size and detail of ImageNet's, 110 kB each."""
    generator = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"n{index % 4:08d}" / f"{index}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse, fine = (generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((12, 16), (188, 250)))
        layers = [
            Image.fromarray(layer).resize(IMAGENET_IMAGE_SIZE, Image.Resampling.BICUBIC) for layer in (coarse, fine)
        ]
        Image.blend(*layers, 0.25).save(path, quality=92)


def run_stage(arguments: list[str], peak: list[float] | None = None) -> list[tuple[float, int]]:
    """Runs the stage's command. Returns (time, images done) after each shard."""
    return run_job("pipelines.encode.__main__", "pipelines.encode.run", "encoded", arguments, peak)


def bare_images_per_second(vae: AutoencoderKL, pixels: np.ndarray, batch_size: int, batches: int) -> float:
    """Images per second of the autoencoder alone on all cores: median over batches, after one warm-up batch."""
    vae = vae.to(memory_format=torch.channels_last)
    seconds = []
    for index in range(batches + 1):
        batch = torch.from_numpy(pixels[index * batch_size % len(pixels) :][:batch_size].copy())
        began = time.perf_counter()
        encode_moments(vae, batch).half()
        seconds.append((time.perf_counter() - began) / len(batch))
    return 1.0 / statistics.median(seconds[1:])


def measure_decode(folder: Path) -> dict[str, float]:
    """Images per second of decoding and cropping on one core."""
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
    """Compares the stage with the plain loop, which runs before and after it, without mirror images."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**STABLE_DIFFUSION).eval().requires_grad_(False)
    vae.save_pretrained(work / "vae")
    pixels = np.stack([decode_image(path.read_bytes(), 256) for path in sorted(folder.rglob("*.JPEG"))[:48]])
    bare = [bare_images_per_second(vae, pixels, 8, arguments.bare_batches)]
    seen = run_stage(
        ["--images", str(folder), "--output", str(work / "latents"), "--vae", str(work / "vae"), "--no-mirror",
         "--images-per-shard", "8"]
    )  # fmt: skip
    bare.append(bare_images_per_second(vae, pixels, 8, arguments.bare_batches))
    # Only the time in which every encoder has work: from the first shard, after start-up, to 95 % of the images.
    (began, first), (ended, last) = seen[0], next(line for line in seen if line[1] >= 0.95 * arguments.images)
    stage = (last - first) / (ended - began)
    return {
        "bare_images_per_second": statistics.mean(bare),
        "stage_images_per_second": stage,
        "stage_over_bare": stage / statistics.mean(bare),
    }


def measure_memory(arguments: argparse.Namespace, work: Path) -> dict[str, float]:
    """Peak memory with the demo's autoencoder and images. Larger sources contain each image several times, as hard links."""
    drawn, num_drawn = work / "drawn", min(2000, *arguments.memory_images)
    demo_images.write_folder(drawn, num_train=num_drawn, num_val=10)
    figures = {}
    for count in arguments.memory_images:
        folder = work / f"images-{count}"
        for index in range(count):
            wnid = demo_images.wnid(index % 10)
            source = drawn / "train" / wnid / f"{wnid}_{index % num_drawn}.JPEG"
            target = folder / wnid / f"{index}.JPEG"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, target)
        peak: list[float] = []
        seen = run_stage(
            ["--images", str(folder), "--output", str(work / f"latents-{count}"), "--vae", str(SHIPPED_AUTOENCODER),
             "--image-size", "64", "--images-per-shard", "64"], peak,
        )  # fmt: skip
        figures[f"peak_gigabytes_at_{count}"] = peak[0]
        (began, first), (ended, last) = seen[0], seen[-1]
        figures[f"demo_images_per_second_at_{count}"] = (last - first) / (ended - began)
    first, last = arguments.memory_images[0], arguments.memory_images[-1]
    figures["peak_memory_growth"] = figures[f"peak_gigabytes_at_{last}"] / figures[f"peak_gigabytes_at_{first}"]
    return figures


def measure_gpu(arguments: argparse.Namespace) -> dict[str, float]:
    """Images per second of the autoencoder alone on a GPU, and its share of the peak."""
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
            figures[f"gpu_{name}_share_of_peak"] = rate * ENCODER_FLOPS / (arguments.peak_teraflops * 1e12)
    return figures


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Runs the selected measurements."""
    if "gpu" in arguments.only:
        return measure_gpu(arguments)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_jpegs(work / "photographs", arguments.images)
        if "decode" in arguments.only:
            figures |= measure_decode(work / "photographs")
        if "stage" in arguments.only:
            figures |= measure_stage(arguments, work / "photographs", work)
        if "memory" in arguments.only:
            figures |= measure_memory(arguments, work)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=200, help="images to encode")
    parser.add_argument(
        "--bare-batches", type=int, default=4, help="batches of 8 images for the plain loop, before and after the stage"
    )
    parser.add_argument("--only", nargs="+", default=["decode", "stage"], choices=["decode", "stage", "memory", "gpu"])
    parser.add_argument("--memory-images", type=int, nargs=2, default=[2000, 20_000])
    parser.add_argument("--peak-teraflops", type=float, help="peak of the GPU, for its share")
    main(measure, {"stage_over_bare": (">=", 0.85), "peak_memory_growth": ("<=", 1.15)}, parser)
