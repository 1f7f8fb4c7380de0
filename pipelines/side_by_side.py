"""`python -m pipelines.side_by_side` runs pipelines.evaluate.side_by_side."""

from pipelines.command_line import run_command
from pipelines.evaluate.side_by_side import main

if __name__ == "__main__":
    run_command(main)
