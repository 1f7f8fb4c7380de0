"""Image files -> pixels: finding them in class folders, decoding, and ADM's centre crop."""

import hashlib
import io
import logging
from dataclasses import dataclass

import numpy as np
from PIL import Image
from pyarrow import fs

from pipelines import storage
from pipelines.command import InputError

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
CLASS_NAMES_FILE = "LOC_synset_mapping.txt"


@dataclass(frozen=True)
class ImageFolder:
    """Class folders of images, as ImageNet is laid out: root/<wnid>/<name>.JPEG."""

    root: str
    """Path in the file system."""
    paths: list[str]
    """Every image's path under the root, sorted."""
    labels: list[int]
    """Its class: the rank of its folder among the sorted folder names."""
    wnids: list[str]
    """Folder name per class."""
    sizes: list[int]
    """Every image's size in bytes."""
    class_names: list[str]
    """Name per class, from LOC_synset_mapping.txt beside or above the root; the folder's name where there is none."""

    @property
    def sha256(self) -> str:
        """Hash of paths and sizes: what an encoding of this folder is identified by."""
        lines = (f"{path}\t{size}\n" for path, size in zip(self.paths, self.sizes, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def sample_id(self, index: int) -> str:
        """The path under the root without its extension: stable, whatever else is in the folder."""
        return self.paths[index].rsplit(".", 1)[0]


def find_images(location: str) -> tuple[fs.FileSystem, ImageFolder]:
    """Lists the images of a folder of class folders.

    Raises InputError where the folder is missing, a file, empty, or holds images outside of class folders.
    """
    filesystem, root = storage.require_folder(location, "image folder")
    entries = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    size_of = {
        entry.path[len(root) :].lstrip("/"): entry.size
        for entry in entries
        if entry.type == fs.FileType.File and entry.path.lower().endswith(IMAGE_EXTENSIONS)
    }
    files = sorted(size_of)
    if not files:
        raise InputError(
            f"no images in {location}: wanted class folders of {', '.join(IMAGE_EXTENSIONS)} files, such as "
            f"{location}/n01440764/n01440764_18.JPEG"
        )
    stray = [path for path in files if "/" not in path]
    if stray:
        raise InputError(
            f"{len(stray)} images lie in {location} itself, such as {stray[0]}; their folder names their class, "
            f"so put each into one"
        )
    ids = {path.rsplit(".", 1)[0] for path in files}
    if len(ids) < len(files):
        raise InputError(
            f"{len(files) - len(ids)} images in {location} differ in nothing but their extension; rename them"
        )
    wnids = sorted({path.split("/")[0] for path in files})
    rank = {wnid: label for label, wnid in enumerate(wnids)}
    names = _read_class_names(filesystem, root)
    return filesystem, ImageFolder(
        root=root,
        paths=files,
        labels=[rank[path.split("/")[0]] for path in files],
        wnids=wnids,
        sizes=[size_of[path] for path in files],
        class_names=[names.get(wnid, wnid) for wnid in wnids],
    )


def _read_class_names(filesystem: fs.FileSystem, root: str) -> dict[str, str]:
    # Kaggle keeps the file some levels above Data/CLS-LOC/train; look upwards a little.
    folder = root
    for _ in range(4):
        path = f"{folder}/{CLASS_NAMES_FILE}"
        if filesystem.get_file_info(path).type == fs.FileType.File:
            lines = storage.read_bytes(filesystem, path).decode().splitlines()
            pairs = (line.split(" ", 1) for line in lines if " " in line)
            return {wnid: name.strip() for wnid, name in pairs}
        folder = folder.rsplit("/", 1)[0]
    return {}


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to (size, size): halve with a box filter while twice too large, then bicubic, then crop.

    Source: center_crop_arr of openai/guided-diffusion (MIT), which DiT, SiT and MeanFlow use; rewritten.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def decode_image(content: bytes, size: int) -> np.ndarray:
    """The bytes of an image file -> uint8 RGB (size, size, 3). EXIF orientation is not applied, as nowhere in the field.

    Raises what Pillow raises for bytes that it cannot read.
    """
    with Image.open(io.BytesIO(content)) as image:
        return np.array(center_crop(image.convert("RGB"), size))  # a copy: Pillow's own is read-only


def read_pixels(filesystem: fs.FileSystem, folder: ImageFolder, size: int) -> tuple[np.ndarray, np.ndarray]:
    """All readable images of a folder: uint8 (N, size, size, 3), and labels int64 (N,); the others are logged."""
    pixels, labels = [], []
    for path, label in zip(folder.paths, folder.labels, strict=True):
        content = storage.read_bytes(filesystem, f"{folder.root}/{path}")  # storage that fails is no bad image
        try:
            pixels.append(decode_image(content, size))
            labels.append(label)
        except Exception as error:  # Pillow raises many kinds; one bad file must not end an evaluation
            logger.warning("left out unreadable %s: %s", path, error)
    if not pixels:
        raise InputError(f"none of the {len(folder.paths)} images in {folder.root} can be read")
    return np.stack(pixels), np.asarray(labels, dtype=np.int64)
