"""Samples in the format of ADM's evaluation suite: an .npz with arr_0, uint8 (N, H, W, 3).

Files are written in pieces and read by memory mapping, because 50,000 samples of 256x256 pixels take 9.8 GB.
"""

import os
import struct
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.errors import InputError

MEMBER = "arr_0.npy"
# Fixed part of a zip member's header; the member's name and extra field follow. Its last 4 bytes are the lengths of these
# two, each in 2 bytes (PKWARE APPNOTE 4.3.7).
LOCAL_HEADER_BYTES = 30


class SampleFileWriter:
    """Writes a sample file in pieces, under a temporary name until `close`."""

    def __init__(self, path: Path, num_samples: int, image_size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self.num_samples = num_samples
        self.num_written = 0
        self._zip = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_STORED)
        self._member = self._zip.open(MEMBER, "w", force_zip64=True)
        shape = (num_samples, image_size, image_size, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._member, header)

    def write(self, images: np.ndarray) -> None:
        """Appends images uint8 (n, H, W, 3)."""
        self.num_written += len(images)
        assert self.num_written <= self.num_samples, f"{self.num_written} samples, but expected {self.num_samples}"
        self._member.write(np.ascontiguousarray(images).tobytes())

    def close(self) -> None:
        """Completes the file and renames it to its final name."""
        assert self.num_written == self.num_samples, f"{self.num_written} of {self.num_samples} samples were written"
        self._member.close()
        self._zip.close()
        os.replace(self._partial, self._path)


def open_sample_file(path: Path) -> np.ndarray:
    """Opens arr_0 of an .npz, uint8 (N, H, H, 3); memory-mapped if it is not compressed.

    Raises InputError for a missing or invalid file.
    """
    try:
        with zipfile.ZipFile(path) as file:
            member = file.getinfo(MEMBER)
        if member.compress_type == zipfile.ZIP_STORED:
            images = _map_array(path, member.header_offset)
        else:
            with np.load(path, allow_pickle=False) as arrays:
                images = arrays["arr_0"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"cannot read arr_0 from {path}: {error}; give an .npz of samples, as --save-samples writes"
        ) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise InputError(f"arr_0 of {path} must be uint8 (N, H, H, 3), but is {images.dtype} {images.shape}")
    return images


def _map_array(path: Path, header_offset: int) -> np.ndarray:
    """Memory-maps an uncompressed .npy member of a zip file."""
    with open(path, "rb") as file:
        file.seek(header_offset + LOCAL_HEADER_BYTES - 4)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
        file.seek(header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes)
        # Skips the format version. It is 1.0 for images: numpy uses later ones for long headers and Unicode names only.
        np.lib.format.read_magic(file)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject:
            raise ValueError("it contains Python objects")
        order: Literal["F", "C"] = "F" if is_fortran else "C"
        return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order=order)
