"""The train command: `python -m pipelines.train`."""

from pipelines.command_line import run_command
from pipelines.train.run import main

if __name__ == "__main__":
    run_command(main)
