"""The encode command: `python -m pipelines.encode`."""

from pipelines.command_line import run_command
from pipelines.encode.run import main

if __name__ == "__main__":
    run_command(main)
