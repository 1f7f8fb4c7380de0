"""`python -m pipelines.reference` runs pipelines.evaluate.reference."""

from pipelines.command_line import run_command
from pipelines.evaluate.reference import main

if __name__ == "__main__":
    run_command(main)
