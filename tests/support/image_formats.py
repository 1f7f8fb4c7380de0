"""Copies images from class folders to the encode stage's other input formats, Parquet and WebDataset."""

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def images_of(root: Path) -> list[tuple[str, int, bytes]]:
    """(path, label, bytes) of every image in class folders, sorted by path."""
    paths = sorted(root.rglob("*.JPEG"))
    wnids = sorted({path.parent.name for path in paths})
    return [(str(path.relative_to(root)), wnids.index(path.parent.name), path.read_bytes()) for path in paths]


def write_parquet(
    path: Path, images: list[tuple[str | None, int | None, bytes | None]], names: list[str] | None = None
):
    """Writes (path, label, bytes) rows as Hugging Face's `datasets` does, in row groups of 7."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array([{"bytes": content, "path": name} for name, _, content in images], image),
            "label": pa.array([label for _, label, _ in images], pa.int64()),
        }
    )
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=7)


def write_tar(path: Path, members: list[tuple[str, bytes]]):
    """Writes a tar archive with (name, content) members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def webdataset_members(images: list[tuple[str, int, bytes]]) -> list[tuple[str, bytes]]:
    """Tar members in WebDataset format: a .jpg and a .cls for each image; every third image has a .json instead."""
    members = []
    for row, (name, label, content) in enumerate(images):
        key = Path(name).stem
        label_file = (f"{key}.cls", str(label)) if row % 3 else (f"{key}.json", json.dumps({"label": label}))
        members += [(f"{key}.jpg", content), (label_file[0], label_file[1].encode())]
    return members


IDX_PIXELS = np.random.default_rng(0).integers(0, 256, (8, 20, 28), dtype=np.uint8)
IDX_LABELS = np.array([3, 0, 1, 1, 2, 3, 0, 2], np.uint8)


def write_idx(folder: Path, split: str = "train", *, compressed: bool = False) -> None:
    """Writes IDX_PIXELS and IDX_LABELS as a pair of IDX files."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in (
        ("images-idx3-ubyte", struct.pack(">IIII", 0x803, *IDX_PIXELS.shape) + IDX_PIXELS.tobytes()),
        ("labels-idx1-ubyte", struct.pack(">II", 0x801, len(IDX_LABELS)) + IDX_LABELS.tobytes()),
    ):
        if compressed:
            (folder / f"{split}-{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{split}-{name}").write_bytes(content)
