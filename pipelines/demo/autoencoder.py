"""Where the demo's autoencoder is: a small `AutoencoderKL` for the drawn images, 64x64 -> 4x8x8.

Its README.md says how it was trained, and how `meanflow autoencoder` trains another one.
"""

from pathlib import Path

SHIPPED_AUTOENCODER = Path(__file__).parent / "autoencoder_weights"
