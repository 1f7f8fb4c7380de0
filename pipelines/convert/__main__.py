"""Converts a published checkpoint to a generator in the format of `meanflow train`.

    meanflow convert --source sit --checkpoint SiT-XL-2-256.pt --output build/sit --vae stabilityai/sd-vae-ft-mse

Sources: official-meanflow and official-imf (the authors' Flax parameters, as .npz or msgpack), imf-torch, sit, repa and
zhuyu-cs. The file determines the size of the network. If its parameters do not match, the error lists every difference.
Code in the file is never run.
"""

from pipelines.command_line import parse_command_line, run_command
from pipelines.convert.job import ConvertJob


def main() -> None:
    """Runs the command."""
    job = parse_command_line(ConvertJob, __doc__)
    from pipelines.convert.run import convert  # slow: it imports torch and diffusers

    output, num_parameters = convert(job)
    print(f"generator: {output} ({num_parameters:,} parameters)")


if __name__ == "__main__":
    run_command(main)
