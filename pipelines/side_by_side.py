"""`python -m pipelines.side_by_side` starts pipelines.evaluate.side_by_side."""

import runpy

if __name__ == "__main__":
    runpy.run_module("pipelines.evaluate.side_by_side", run_name="__main__", alter_sys=True)
