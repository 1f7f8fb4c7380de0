"""The short name of a command: `meanflow latent-cache` runs pipelines.latents.cache_command."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pipelines.latents.cache_command", run_name="__main__")
