"""The evaluate command: `python -m pipelines.evaluate`."""

from pipelines.command_line import run_command
from pipelines.evaluate.run import main

if __name__ == "__main__":
    run_command(main)
