"""`python -m pipelines.reference` starts pipelines.evaluate.reference."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pipelines.evaluate.reference", run_name="__main__", alter_sys=True)
