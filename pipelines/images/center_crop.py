"""ADM's centre crop, the preprocessing of ADM, DiT, SiT and MeanFlow."""

from PIL import Image

CROP = "adm_center_crop"  # name of `center_crop` in recipes and protocols


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resizes the image so that its shorter side is `size`, then cuts out the central (size, size) square.

    A box filter halves the image while the shorter side is at least 2 * size; bicubic resizing does the rest.
    Source: center_crop_arr of openai/guided-diffusion (MIT), rewritten.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
