"""Cost of the control plane at ImageNet's size, on two cores and without a GPU.

    python tests/benchmarks/scale --json scale.json                                # all parts: half an hour
    python tests/benchmarks/scale --json scale.json --parts train serve/queue      # parts, or single experiments
    python tests/benchmarks/scale --json scale.json --num-images 2000              # toy sizes

The project's own functions run at a quarter, a half and all of the size, each in a process of its own. What is simulated
(files, devices, other workers) is printed with every experiment. The exit code is 1 if a figure falls short.
"""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a driver shares its machine
# No token file in the home folder, and no telemetry.
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", MLFLOW_DISABLE_TELEMETRY="true")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[2])]  # the parts, the other benchmarks, the package

from results import IMAGENET, Row, in_process, markdown, run_experiment  # noqa: E402

PARTS = {"encode": "encoding", "train": "training", "evaluate": "evaluation", "serve": "serving"}


def run_part(part: str, wanted: list[str], num_images: int) -> list[Row]:
    """Runs the experiments of a part whose names are wanted. Imports heavy packages, so it gets a process of its own."""
    rows: list[Row] = []
    for name, experiment in importlib.import_module(PARTS[part]).experiments(num_images).items():
        if part in wanted or f"{part}/{name}" in wanted:
            rows += run_experiment(f"{part}/{name}", experiment)
    return rows


def hardware() -> dict[str, object]:
    """The machine that measured."""
    from _harness import machine  # imports torch

    return {**machine(), "load_average": os.getloadavg()}


def main() -> int:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="output file for the results")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), help="parts or experiments (default: all parts)")
    parser.add_argument("--num-images", type=int, default=IMAGENET, help="N; the other sizes shrink in proportion")
    arguments = parser.parse_args()
    unknown = {part.split("/")[0] for part in arguments.parts} - set(PARTS)
    if unknown:
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    rows: list[Row] = []
    content = {"num_images": arguments.num_images, "machine": in_process(hardware)}
    for part in PARTS:
        if any(name.split("/")[0] == part for name in arguments.parts):
            rows += in_process(run_part, part, arguments.parts, arguments.num_images)
            if arguments.json is not None:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps({**content, "rows": [vars(row) for row in rows]}, indent=2) + "\n")
    print(markdown(rows))
    missing = [name for name in arguments.parts if not any(f"{row.experiment}/".startswith(f"{name}/") for row in rows)]
    if missing:
        parser.error(f"no experiment {', '.join(missing)}; measured: {', '.join({row.experiment for row in rows})}")
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
