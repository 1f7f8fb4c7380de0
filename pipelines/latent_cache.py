"""`python -m pipelines.latent_cache` runs pipelines.latents.cache."""

from pipelines.command_line import run_command
from pipelines.latents.cache import main

if __name__ == "__main__":
    run_command(main)
