"""Checks and times the core on one GPU, in at most eight minutes on an H100. Needs neither Ray nor a network.

    make gpu
    python tests/benchmarks/gpu --json build/gpu.json --markdown build/gpu.md
    python tests/benchmarks/gpu --json build/gpu.json --markdown build/gpu.md --toy     # tiny, also on a CPU

The parts run one after another. Each ends by itself, and both files are written after each, so that a run that is cut short
leaves what it had. The exit code is 1 if a figure is above its limit or a part failed.
"""

import argparse
import os
import sys
from pathlib import Path

# Without this, cuBLAS is not deterministic; it is read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[2])]  # the parts, the other benchmarks, the package

import exactness  # noqa: E402
import speed  # noqa: E402
import torch  # noqa: E402
from _harness import machine  # noqa: E402
from report import PartResult, Setup, missed, run_part, write  # noqa: E402

# Seconds after which a part starts no further measurement.
LIMITS = {"Training steps": 180.0, "du/dt by precision and depth": 40.0}
DEFAULT_LIMIT = 30.0  # 460 s in all


def main() -> int:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on a GPU or a CPU")
    parser.add_argument("--parts", nargs="*", default=[], help="words of the titles of the parts to run (default: all)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.toy:
        parser.error("this needs a GPU that torch can use; pass --toy to try the script on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setup = Setup(device=device, is_toy=arguments.toy)
    results: list[PartResult] = []
    for title, part in {**exactness.PARTS, **speed.PARTS}.items():
        if not arguments.parts or any(word in title for word in arguments.parts):
            print(title, flush=True)
            results.append(run_part(title, part, setup, LIMITS.get(title, DEFAULT_LIMIT)))
            write(results, machine(), arguments.json, arguments.markdown)
    problems = missed(results)
    print("\n".join(problems) or "all figures are within their limits")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
