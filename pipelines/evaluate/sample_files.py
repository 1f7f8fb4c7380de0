"""Samples as ADM's evaluation suite reads them: an .npz with arr_0, uint8 (N, H, W, 3).

Written row by row and read by mapping, so that 50,000 samples (9.8 GB at 256 pixels) need no memory.
"""

import os
import struct
import zipfile
from pathlib import Path

import numpy as np

from pipelines.errors import InputError

MEMBER = "arr_0.npy"
LOCAL_HEADER_BYTES = 30  # of a zip's member, before its name and extra field (PKWARE's APPNOTE, 4.3.7)


class SampleFile:
    """A file of samples being written. It has its name when it is complete, and not before."""

    def __init__(self, path: Path, num_samples: int, image_size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._left = num_samples
        self._zip = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_STORED)
        self._member = self._zip.open(MEMBER, "w", force_zip64=True)
        shape = (num_samples, image_size, image_size, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._member, header)

    def write(self, images: np.ndarray) -> None:
        """Appends images uint8 (n, H, W, 3)."""
        self._left -= len(images)
        assert self._left >= 0, "more samples than announced"
        self._member.write(np.ascontiguousarray(images).tobytes())

    def close(self) -> None:
        """Completes the file and gives it its name."""
        assert self._left == 0, f"{self._left} samples were not written"
        self._member.close()
        self._zip.close()
        os.replace(self._partial, self._path)


def open_sample_file(path: Path) -> np.ndarray:
    """arr_0 of an .npz, uint8 (N, H, W, 3), mapped into memory where it is not compressed.

    Raises InputError where there is none, or it is something else.
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
        raise InputError(f"{path} is no .npz with arr_0: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise InputError(f"arr_0 of {path} must be uint8 (N, H, H, 3), but is {images.dtype} {images.shape}")
    return images


def _map_array(path: Path, header_offset: int) -> np.ndarray:
    with open(path, "rb") as file:
        file.seek(header_offset + LOCAL_HEADER_BYTES - 4)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
        file.seek(header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes)
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
        if dtype.hasobject or fortran_order:
            raise ValueError(f"wanted plain bytes in C order, but it has {dtype}")
        return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape)
