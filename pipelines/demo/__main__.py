"""Runs the whole pipeline on a laptop: draws the demo's images, then encodes, trains, evaluates and serves.

Each stage is a process, started by the command that the README documents. All results are below --work, which is replaced.
The demo stops all of its processes when it ends, also after an error or an interrupt.
"""

from pipelines.command_line import parse_command_line, run_command
from pipelines.demo.job import Demo


def main() -> None:
    """Runs the command."""
    demo = parse_command_line(Demo, __doc__)
    from pipelines.demo.run import run_demo  # imports torch

    run_demo(demo)


if __name__ == "__main__":
    run_command(main)
