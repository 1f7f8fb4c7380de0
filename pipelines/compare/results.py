"""Collects the measurements of all trials into the report's results and ratios."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.compare.measuring_trials import read_quality, sampling_points
from pipelines.compare.methods import Budget, Trial


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, minimum and maximum."""
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def collect_results(
    steps: Mapping[Budget, Mapping[str, int]],
    methods: Sequence[str],
    seeds: Sequence[int],
    nfe: Sequence[int],
    folder: Path,
) -> list[dict[str, Any]]:
    """One result per budget, method, solver and NFE: the measurements of each seed, and their spread.

    steps: {budget: {method: steps}}. folder: the folder of all trials, each of which has been measured.
    """
    results = []
    for budget, by_method in steps.items():
        for method in methods:
            trials = [Trial(method=method, seed=seed, num_steps=by_method[method]) for seed in seeds]
            for point in sampling_points(trials[0].config, nfe):
                qualities = [quality for t in trials if (quality := read_quality(folder / t.name, point)) is not None]
                assert len(qualities) == len(trials)
                results.append(
                    {
                        "budget": budget,
                        "method": method,
                        "num_steps": by_method[method],
                        "solver": point.solver,
                        "nfe": point.nfe,
                        "frechet": spread([quality.frechet for quality in qualities]),
                        "accuracy": spread([quality.accuracy for quality in qualities]),
                        "by_seed": [
                            {"seed": seed, **asdict(quality)} for seed, quality in zip(seeds, qualities, strict=True)
                        ],
                    }
                )
    return results


def ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fréchet distance of each MeanFlow variant at 1 NFE, divided by that of flow matching (Euler) at most NFE and at 1 NFE.

    Ratios are computed per seed. Empty if flow matching or 1 NFE was not measured.
    """
    distances = {
        (result["budget"], result["method"], result["nfe"]): [entry["frechet"] for entry in result["by_seed"]]
        for result in results
        if result["solver"] == "euler"
    }
    most = max(nfe for _, _, nfe in distances)
    found = []
    for (budget, method, nfe), values in distances.items():
        at_most, at_one = (distances.get((budget, "flow_matching", count)) for count in (most, 1))
        if nfe != 1 or method == "flow_matching" or at_most is None or at_one is None:
            continue
        over_most, over_one = (spread([a / b for a, b in zip(values, base, strict=True)]) for base in (at_most, at_one))
        found.append({"budget": budget, "method": method, "over_most_nfe": over_most, "over_one_nfe": over_one})
    return found
