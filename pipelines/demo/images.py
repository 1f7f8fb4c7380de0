"""The demo's images: ten drawn shapes, each a pure function of (split, index).

A model learns them in minutes on two CPU cores. The task is not trivial, because position, size, rotation, colour and
background vary within a class and are independent of it. Every shape covers the same area, so the mean and the spread
of an image's colours are independent of the class, too. Every factor's distribution is symmetric under mirroring,
because training uses each image and its mirror image.

The images are JPEGs in ImageNet's folder layout, so that the encode stage reads them as it reads ImageNet:

    root/train/d0000003/d0000003_13.JPEG
    root/val/d0000003/d0000003_3.JPEG
    root/LOC_synset_mapping.txt             "d0000003 cross", a line per class, as in Kaggle's ImageNet
"""

import colorsys
import functools
import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines import storage
from pipelines.command_line import parse_command_line, run_command
from pipelines.progress import Progress

logger = logging.getLogger(__name__)

IMAGE_SIZE = 64
# By label. The encode stage numbers the sorted folder names (see `wnid`), which gives the same labels.
CLASS_NAMES = ("arrow", "circle", "crescent", "cross", "flower", "heart", "ring", "square", "star", "triangle")
# Each consumer has its own split; splits share no image. The shipped autoencoder was trained on "autoencoder".
SPLITS = ("train", "val", "autoencoder", "judge")
# Range of a shape's size, given as the radius of a disc of equal area. 1 is half the image width.
RADIUS = (0.42, 0.52)
MAX_SHIFT = 0.15  # of the half width, along each axis
MAX_ROTATION_DEGREES = 20.0
SATURATION = (0.45, 0.8)

Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]


def wnid(label: int) -> str:
    """Folder name of a class: like a WordNet id, but with a "d" to avoid confusion with real ones."""
    return f"d{label:07d}"


def _polygon(corners: np.ndarray) -> Shape:
    """Signed distance to a simple polygon with corners (K, 2); negative inside."""

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        nearest = np.full(x.shape, np.inf)
        inside = np.zeros(x.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            ex, ey = bx - ax, by - ay
            along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0.0, 1.0)
            nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
            if ay != by:
                inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
        return np.where(inside, -nearest, nearest)

    return distance


def _star_corners(points: int, inner_radius: float) -> np.ndarray:
    angle = np.pi / 2 + np.arange(2 * points) * np.pi / points
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner_radius)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Half-discs on the two upper edges of a square rotated by 45 degrees. The distance is exact inside and outside.
    x, y = np.abs(x), y + 0.6
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2.0) / 4.0
    diagonal = np.maximum(x + y, 0.0) / 2.0
    tip = np.minimum(np.hypot(x, y - 1.0), np.hypot(x - diagonal, y - diagonal)) * np.sign(x - y)
    return np.where(x + y > 1.0, lobe, tip)


def _flower(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Five petals with the outline r = 0.68 + 0.32 cos(5 (angle - 90 degrees)). The radial distance is divided by the norm of
    # its gradient. The result is correct to first order near the outline, and antialiasing uses it only there.
    radius, angle = np.hypot(x, y), np.arctan2(y, x) - np.pi / 2
    slope = -1.6 * np.sin(5 * angle) / np.maximum(radius, 0.2)
    return (radius - 0.68 - 0.32 * np.cos(5 * angle)) / np.hypot(1.0, slope)


_ARROW_CORNERS = np.array([(0.0, 1.0), (0.8, 0.1), (0.32, 0.1), (0.32, -0.9), (-0.32, -0.9), (-0.32, 0.1), (-0.8, 0.1)])
_CROSS_ARM = [(-0.3, 0.3), (-0.3, 1.0), (0.3, 1.0)]  # rotated four times by 90 degrees
_CROSS_CORNERS = np.array(
    [corner for turn in range(4) for corner in np.array(_CROSS_ARM) @ np.linalg.matrix_power([[0, -1], [1, 0]], turn)]
)
_SQUARE_CORNERS = np.array([(1, 1), (1, -1), (-1, -1), (-1, 1)])

# Signed distances. The shapes' sizes are arbitrary, because `shape_scale` normalises them to the same area.
SHAPES: dict[str, Shape] = {
    "arrow": _polygon(_ARROW_CORNERS),
    "circle": lambda x, y: np.hypot(x, y) - 1.0,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y + 0.12) - 1.0, 0.78 - np.hypot(x, y - 0.42)),
    "cross": _polygon(_CROSS_CORNERS),
    "flower": _flower,
    "heart": _heart,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.78) - 0.22,
    "square": _polygon(_SQUARE_CORNERS),
    "star": _polygon(_star_corners(5, 0.48)),
    "triangle": _polygon(_star_corners(3, 0.5)),  # inner corners at radius 0.5 lie on straight edges
}


@functools.cache
def shape_scale(name: str) -> float:
    """Factor that scales a shape to the area of the unit disc. Divide coordinates by it to draw the scaled shape."""
    axis = np.linspace(-2.0, 2.0, 801)
    x, y = np.meshgrid(axis, axis)
    area = float(np.count_nonzero(SHAPES[name](x, y) < 0)) * (axis[1] - axis[0]) ** 2
    return float(np.sqrt(np.pi / area))


def _gradient(
    first: tuple[float, ...], second: tuple[float, ...], angle: float, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    share = np.clip(0.5 + 0.5 * (x * np.cos(angle) + y * np.sin(angle)), 0.0, 1.0)[..., None]
    return np.asarray(first) * (1.0 - share) + np.asarray(second) * share


@dataclass(frozen=True)
class Factors:
    """Factors of variation within a class, independent of it."""

    shift_x: float
    """Horizontal shift of the shape's centre, in half image widths."""
    shift_y: float
    """Vertical shift, upwards."""
    rotation: float
    """In radians."""
    radius: float
    """Size of the shape: the radius of a disc of equal area, in half image widths."""
    hue: float
    """Hue of the shape, in turns."""
    hue_change: float
    """Change of hue along the shape's gradient."""
    saturation: float
    """Saturation of the shape."""
    angle: float
    """Direction of the shape's gradient in radians."""
    background_hue: float
    """Hue of the background, in turns."""
    background_hue_change: float
    """Change of hue along the background's gradient."""
    background_angle: float
    """Direction of the background's gradient in radians."""

    def as_targets(self) -> np.ndarray:
        """Regression targets for the judge: float32 (13,), in [-1, 1] with mean 0; angles and hues as cosine and sine."""
        angles = np.array([2 * np.pi * self.hue, 2 * np.pi * self.background_hue, self.angle, self.background_angle])
        middle, half = (RADIUS[0] + RADIUS[1]) / 2, (RADIUS[1] - RADIUS[0]) / 2
        plain = [
            self.shift_x / MAX_SHIFT,
            self.shift_y / MAX_SHIFT,
            self.rotation / np.deg2rad(MAX_ROTATION_DEGREES),
            (self.radius - middle) / half,
            (self.saturation - sum(SATURATION) / 2) / ((SATURATION[1] - SATURATION[0]) / 2),
        ]
        return np.concatenate([plain, np.cos(angles), np.sin(angles)]).astype(np.float32)


def factors(split: str, index: int) -> Factors:
    """Factors of image `index` of a split. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    random = np.random.default_rng([SPLITS.index(split), index])
    shift_x, shift_y = random.uniform(-MAX_SHIFT, MAX_SHIFT, 2)
    rotation = np.deg2rad(random.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES))
    radius = random.uniform(*RADIUS)
    hue, background_hue = random.uniform(0.0, 1.0, 2)
    angle, background_angle = random.uniform(0.0, 2.0 * np.pi, 2)
    saturation = random.uniform(*SATURATION)
    return Factors(
        shift_x=shift_x, shift_y=shift_y, rotation=rotation, radius=radius, hue=hue, saturation=saturation, angle=angle,
        background_hue=background_hue, background_angle=background_angle,
        background_hue_change=random.uniform(-0.1, 0.1), hue_change=random.uniform(-0.08, 0.08),
    )  # fmt: skip


def draw(split: str, index: int) -> tuple[np.ndarray, int]:
    """Draws image `index` of a split: uint8 RGB (64, 64, 3), and its label, index mod 10.

    Raises ValueError for an unknown split.
    """
    label = index % len(CLASS_NAMES)
    name = CLASS_NAMES[label]
    f = factors(split, index)

    half_pixel = 1.0 / IMAGE_SIZE
    axis = np.linspace(-1.0 + half_pixel, 1.0 - half_pixel, IMAGE_SIZE)
    x, y = np.meshgrid(axis, -axis)  # y upwards
    background = _gradient(
        colorsys.hsv_to_rgb(f.background_hue, 0.55, 0.34),
        colorsys.hsv_to_rgb(f.background_hue + f.background_hue_change, 0.65, 0.10),
        f.background_angle, x, y,
    )  # fmt: skip
    fill = _gradient(
        colorsys.hsv_to_rgb(f.hue, f.saturation, 1.0),
        colorsys.hsv_to_rgb(f.hue + f.hue_change, f.saturation, 0.78),
        f.angle, 2 * x, 2 * y,
    )  # fmt: skip

    scale = f.radius * shape_scale(name)
    dx, dy = (x - f.shift_x) / scale, (y - f.shift_y) / scale
    cos, sin = np.cos(f.rotation), np.sin(f.rotation)
    distance = SHAPES[name](cos * dx + sin * dy, cos * dy - sin * dx) * scale
    coverage = np.clip(0.5 - distance / (2.0 * half_pixel), 0.0, 1.0)[..., None]  # one pixel of antialiasing
    image = background * (1.0 - coverage) + fill * coverage
    return np.round(255.0 * image).astype(np.uint8), label


def draw_many(split: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws images start..stop-1 of a split: uint8 (N, 64, 64, 3) and labels int64 (N,)."""
    images, labels = zip(*(draw(split, index) for index in range(start, stop)), strict=True)
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def _write_range(job: tuple[Path, str, int, int]) -> int:
    root, split, start, stop = job
    for index in range(start, stop):
        image, label = draw(split, index)
        path = root / split / wnid(label) / f"{wnid(label)}_{index}.JPEG"
        # No chroma subsampling: blurred colour edges would dominate the autoencoder's error.
        Image.fromarray(image).save(path, quality=95, subsampling=0)
    return stop - start


def write_folder(root: Path, num_train: int, num_val: int, num_processes: int = 2) -> None:
    """Writes train/, val/ and LOC_synset_mapping.txt under `root`, and overwrites existing files."""
    for split in ("train", "val"):
        for label in range(len(CLASS_NAMES)):
            (root / split / wnid(label)).mkdir(parents=True, exist_ok=True)
    mapping = "".join(f"{wnid(label)} {name}\n" for label, name in enumerate(CLASS_NAMES))
    (root / "LOC_synset_mapping.txt").write_text(mapping)

    chunk = 500
    jobs = [
        (root, split, start, min(start + chunk, count))
        for split, count in (("train", num_train), ("val", num_val))
        for start in range(0, count, chunk)
    ]
    progress, num_written = Progress(logger, "drew", "images", num_train + num_val), 0
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        for written in pool.imap_unordered(_write_range, jobs):
            num_written += written
            progress.update(num_written)


@dataclass(frozen=True, kw_only=True)
class DrawImages:
    """Draw the synthetic demo images as JPEG in ImageNet's folder layout."""

    output: Path
    """Folder to write: train/, val/ and LOC_synset_mapping.txt."""
    num_train: int = 8000
    """Training images."""
    num_val: int = 1000
    """Held-out images."""
    num_processes: int = 2
    """Number of processes that draw."""


def main() -> None:
    """Runs the command."""
    config = parse_command_line(DrawImages, __doc__)
    output = Path(storage.output_location(str(config.output), "--output"))
    write_folder(output, config.num_train, config.num_val, config.num_processes)


if __name__ == "__main__":
    run_command(main)
