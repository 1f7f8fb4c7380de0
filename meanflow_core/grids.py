"""Grids of images."""

import numpy as np


def image_grid(images: np.ndarray, num_columns: int, margin: int = 2) -> np.ndarray:
    """Arranges images uint8 (N, H, W, 3) row by row in one uint8 image, with `margin` white pixels between them."""
    count, height, width, _ = images.shape
    rows = -(-count // num_columns)
    grid = np.full((rows * (height + margin) - margin, num_columns * (width + margin) - margin, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // num_columns * (height + margin), index % num_columns * (width + margin)
        grid[top : top + height, left : left + width] = image
    return grid
