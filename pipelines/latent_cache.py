"""`python -m pipelines.latent_cache` starts pipelines.latents.cache."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pipelines.latents.cache", run_name="__main__", alter_sys=True)
