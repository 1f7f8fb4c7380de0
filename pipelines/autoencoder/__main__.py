"""Trains an autoencoder on your own images with Ray Train, for `meanflow encode --vae OUTPUT`.

    meanflow autoencoder --images photos/train --held-out-images photos/validation --output runs/photos-vae \
--image-size 64 --factor 8 --channels 4

The same command resumes an interrupted training from its last checkpoint. The result is a diffusers folder with the
latents' statistics, a model card and a picture of held-out images with their reconstructions. MLFLOW_TRACKING_URI names the
MLflow server; without it, a database in the folder that contains the output is used.
"""

from pipelines.autoencoder.job import AutoencoderJob
from pipelines.command_line import parse_command_line, run_command


def main() -> None:
    """Runs the command."""
    job = parse_command_line(AutoencoderJob, __doc__)
    from pipelines.autoencoder.run import train_autoencoder  # slow: it imports Ray and diffusers

    record = train_autoencoder(job)
    assert record.result is not None
    print(f"autoencoder: {job.output}, {record.result.psnr:.2f} dB; use it with: meanflow encode --vae {job.output}")


if __name__ == "__main__":
    run_command(main)
