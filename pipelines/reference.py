"""Compute reference statistics of real images with a feature extractor, on every device of a cluster.

    meanflow reference --images ILSVRC/Data/CLS-LOC/train --output imagenet256.npz
    meanflow reference --data latents --output decoded.npz

Writes an .npz without pickles. It contains mu and sigma, named as ADM's evaluator and other tools expect; mu_s and sigma_s
if the extractor has spatial features; features for precision and recall; and protocol, a JSON string that describes how
the file was made.
"""

from pipelines.command_line import parse_command_line, run_command
from pipelines.evaluate.job import ReferenceJob


def main() -> None:
    """Computes and writes the reference file."""
    job = parse_command_line(ReferenceJob, __doc__)
    from pipelines.evaluate.make_reference import make_reference
    from pipelines.extractors.opening import distance_name  # after parsing, to keep --help fast

    protocol = make_reference(job)
    print(f"reference: {job.output}, {protocol['num_images']} images, {distance_name(protocol['extractor'])}")


if __name__ == "__main__":
    run_command(main)
