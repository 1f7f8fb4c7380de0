"""Encodes images into VAE latents with Ray Data, on every device of the cluster.

    meanflow encode --images ILSVRC/train --output latents --vae stabilityai/sd-vae-ft-mse --image-size 256

CPU tasks decode images, one actor per GPU encodes them, and CPU tasks write the shards. The source's files alone determine
which images a shard contains, and a shard appears only when complete. After an interruption, the same command encodes the
missing shards. The manifest is written last and completes the dataset.
"""

from pipelines.command_line import parse_command_line, run_command
from pipelines.encode.job import EncodeJob


def main() -> None:
    """Runs the command."""
    job = parse_command_line(EncodeJob, __doc__)
    from pipelines.encode.run import encode  # slow: it imports Ray and diffusers

    encode(job)
    print(f"latent dataset: {job.output}; check it with: meanflow check --data {job.output}")


if __name__ == "__main__":
    run_command(main)
