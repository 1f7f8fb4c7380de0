"""Speed of file formats for latents: reading whole files, as checks do, and random samples, as training does.

    python tests/benchmarks/layout.py --json layout.json

Samples of ImageNet's shape (8x32x32 float16), 512 per file as the encode stage writes them, all in the page cache. Random
access reads batches of 256 samples from all files. Ratios are relative to the shards' format, arrow_tensor.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _harness import interleaved_medians, main
from pyarrow import fs

from pipelines.latents.shards import read_shard, shard_bytes

SHAPE, ROWS, BATCH = (8, 32, 32), 512, 256
NAMES = ("arrow_tensor", "parquet_tensor", "parquet_bytes", "npy")


def write(folder: Path, name: str, number: int, moments: np.ndarray) -> Path:
    """Writes a file in one of the formats."""
    path = folder / f"{name}-{number}"
    labels = np.zeros(len(moments), np.int32)
    if name == "arrow_tensor":
        path.write_bytes(shard_bytes(moments, None, labels, [str(row) for row in labels], []))
    elif name == "npy":
        with open(path, "wb") as file:
            np.save(file, moments)
    else:
        if name == "parquet_tensor":
            column = pa.FixedShapeTensorArray.from_numpy_ndarray(moments)
        else:
            column = pa.array([row.tobytes() for row in moments], pa.binary(moments[0].nbytes))
        table = pa.table({"moments": column, "label": labels})
        pq.write_table(
            table, path, compression="none", use_dictionary=False, write_statistics=False, row_group_size=256
        )
    return path


def read_whole(name: str, path: Path) -> np.ndarray:
    """Reads all moments of a file, (N, *SHAPE)."""
    if name == "arrow_tensor":
        return read_shard(fs.LocalFileSystem(), str(path)).moments
    if name == "npy":
        return np.load(path)
    column = pq.read_table(path)["moments"].combine_chunks()
    if name == "parquet_tensor":
        return column.to_numpy_ndarray()
    return np.frombuffer(column.buffers()[1], np.float16).reshape(-1, *SHAPE)


def row_reader(name: str, paths: list[Path]) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from sample indices (B,) over all files to moments (B, *SHAPE)."""
    if name in ("arrow_tensor", "npy"):
        if name == "npy":
            files = [np.load(path, mmap_mode="r") for path in paths]
        else:
            tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
            files = [table["moments"].chunk(0).to_numpy_ndarray() for table in tables]

        def read(rows: np.ndarray) -> np.ndarray:
            return np.stack([files[row // ROWS][row % ROWS] for row in rows])

        return read

    opened = [pq.ParquetFile(path, memory_map=True) for path in paths]

    def read_groups(rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), *SHAPE), np.float16)
        places = rows // 256  # row group over all files
        for place in np.unique(places):
            group = opened[place * 256 // ROWS].read_row_group(int(place % (ROWS // 256)), columns=["moments"])
            column = group["moments"].combine_chunks()
            if name == "parquet_tensor":
                values = column.to_numpy_ndarray()
            else:
                values = np.frombuffer(column.buffers()[1], np.float16).reshape(-1, *SHAPE)
            found[places == place] = values[rows[places == place] % 256]
        return found

    return read_groups


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Samples per second of each format, and ratios to the shards' format."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        paths: dict[str, list[Path]] = {name: [] for name in NAMES}
        for number in range(arguments.files):
            moments = generator.normal(size=(ROWS, *SHAPE)).astype(np.float16)
            for name in NAMES:
                paths[name].append(write(folder, name, number, moments))
                np.testing.assert_array_equal(read_whole(name, paths[name][-1]), moments)
        wholes: dict[str, Callable[[], object]] = {
            name: lambda name=name: [float(read_whole(name, path)[0, 0, 0, 0]) for path in paths[name]]
            for name in NAMES
        }
        readers = {name: row_reader(name, paths[name]) for name in NAMES}
        rows = generator.integers(0, arguments.files * ROWS, BATCH)
        answers = [reader(rows) for reader in readers.values()]
        assert all(np.array_equal(answer, answers[0]) for answer in answers)
        randoms: dict[str, Callable[[], object]] = {name: lambda name=name: readers[name](rows) for name in NAMES}
        whole, random = interleaved_medians(wholes, arguments.rounds), interleaved_medians(randoms, arguments.rounds)
        figures = {f"{name}_megabytes": paths[name][0].stat().st_size / 1e6 for name in NAMES}
    figures |= {f"{name}_whole_samples_per_second": arguments.files * ROWS / whole[name] for name in NAMES}
    figures |= {f"{name}_random_samples_per_second": BATCH / random[name] for name in NAMES}
    for kind, seconds in (("whole", whole), ("random", random)):
        for name in NAMES[1:]:
            figures[f"shards_over_{name}_{kind}"] = seconds[name] / seconds["arrow_tensor"]
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=16, help="files of 512 samples")
    parser.add_argument("--rounds", type=int, default=7)
    main(
        measure,
        {"shards_over_parquet_tensor_whole": (">=", 2.0), "shards_over_parquet_bytes_random": (">=", 5.0)},
        parser,
    )
