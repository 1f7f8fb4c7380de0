"""Measures reads of latents in random order, compared with the storage formats of public MeanFlow trainers.

    python tests/benchmarks/ingest.py --json ingest.json

Reads moments of ImageNet's shape (8x32x32 float16) from the page cache in batches of 256. Ours: memory-mapped shards
of the node's local cache, in one process. Theirs: one `torch.save` file per image (the authors' MeanFlow) and LMDB
with pickled records (zhuyu-cs/MeanFlow), each with a `DataLoader` of two workers.
"""

import argparse
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import lmdb
import numpy as np
import torch
from _harness import main
from pyarrow import fs
from torch.utils.data import DataLoader, Dataset

from pipelines import storage
from pipelines.latents.cache import open_latents
from pipelines.latents.manifest import EncodingRecipe, Manifest, shard_name, write_manifest
from pipelines.latents.sample_order import samples_of_step
from pipelines.latents.shards import read_shard_bytes, shard_bytes

SHAPE, BATCH, IMAGES_PER_SHARD = (8, 32, 32), 256, 512


class FilePerImage(Dataset):
    """One torch.save file per image."""

    def __init__(self, folder: Path, count: int) -> None:
        self._paths = [folder / f"{index:08d}.pt" for index in range(count)]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        record = torch.load(self._paths[index], weights_only=True)
        return record["image"], record["label"]


class PickledRecords(Dataset):
    """LMDB with one pickled record per image. Each worker opens it once."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count
        self._transaction: lmdb.Transaction | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self._transaction is None:
            environment = lmdb.open(str(self._folder), readonly=True, lock=False, readahead=False, meminit=False)
            self._transaction = environment.begin()
        record = pickle.loads(self._transaction.get(str(index).encode()))
        return torch.from_numpy(np.frombuffer(record["image"], np.float16).reshape(SHAPE).copy()), record["label"]


def write_all(folder: Path, count: int) -> Manifest:
    """Writes the same latents in all three formats."""
    generator = np.random.default_rng(0)
    (folder / "files").mkdir()
    hashes = []
    environment = lmdb.open(str(folder / "lmdb"), map_size=4 * count * int(np.prod(SHAPE)) * 2)
    for start in range(0, count, IMAGES_PER_SHARD):
        moments = generator.normal(size=(IMAGES_PER_SHARD, *SHAPE)).astype(np.float16)
        labels = generator.integers(0, 1000, IMAGES_PER_SHARD)
        ids = [str(start + row) for row in range(IMAGES_PER_SHARD)]
        content = shard_bytes(moments, -moments, labels, ids, [])
        path = folder / "latents" / shard_name(start // IMAGES_PER_SHARD)
        storage.write_bytes(fs.LocalFileSystem(), str(path), content)
        hashes.append(read_shard_bytes(content, "").summary.sha256)
        with environment.begin(write=True) as transaction:
            for row in range(IMAGES_PER_SHARD):
                record = {"image": torch.from_numpy(moments[row]), "label": int(labels[row])}
                torch.save(record, folder / "files" / f"{start + row:08d}.pt")
                pickled = pickle.dumps({"image": moments[row].tobytes(), "label": int(labels[row])})
                transaction.put(str(start + row).encode(), pickled)
    recipe = EncodingRecipe(
        vae_id="none", vae_sha256="", moments_shape=SHAPE, image_size=256, crop="none", source_sha256="",
        images_per_shard=IMAGES_PER_SHARD,
    )  # fmt: skip
    manifest = Manifest(
        recipe=recipe, num_samples=count, num_rejected=0, shard_num_samples=[IMAGES_PER_SHARD] * len(hashes),
        shard_sha256=hashes, class_names=[str(label) for label in range(1000)], wnids=[""] * 1000, source="none",
    )  # fmt: skip
    write_manifest(str(folder / "latents"), manifest)
    return manifest


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Samples per second of each format: median over interleaved epochs."""
    count = arguments.samples // IMAGES_PER_SHARD * IMAGES_PER_SHARD
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_all(folder, count)
        dataset = open_latents(str(folder / "latents"), str(folder / "cache"))
        generator = np.random.default_rng(0)

        def ours() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            for step in range(count // BATCH):
                rows = samples_of_step(0, step, BATCH, count)
                moments, labels = dataset.read(rows, generator.random(BATCH) < 0.5)
                yield torch.from_numpy(moments), torch.from_numpy(labels)

        def loader(records: Dataset) -> DataLoader:
            return DataLoader(records, BATCH, shuffle=True, num_workers=2, persistent_workers=True, drop_last=True)

        files, pickled = loader(FilePerImage(folder / "files", count)), loader(PickledRecords(folder / "lmdb", count))
        epochs: dict[str, Callable[[], Iterable]] = {
            "ours": ours, "file_per_image": lambda: files, "lmdb_pickles": lambda: pickled,
        }  # fmt: skip
        rates: dict[str, list[float]] = {kind: [] for kind in epochs}
        for epoch in range(arguments.epochs + 1):
            for kind, batches in epochs.items():
                began = time.perf_counter()
                rows = sum(len(moments) for moments, _ in batches())
                if epoch:  # the first epoch starts the workers and fills the page cache
                    rates[kind].append(rows / (time.perf_counter() - began))
    figures = {f"{kind}_samples_per_second": statistics.median(values) for kind, values in rates.items()}
    fastest = max(figures["file_per_image_samples_per_second"], figures["lmdb_pickles_samples_per_second"])
    return {**figures, "ours_over_the_faster": figures["ours_samples_per_second"] / fastest}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--epochs", type=int, default=5)
    main(measure, {"ours_over_the_faster": (">=", 5.0)}, parser)
