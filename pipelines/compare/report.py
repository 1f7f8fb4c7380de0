"""The content of a comparison's report, its table, and the sentences that follow from it."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.compare.job import BUDGET_TITLES, TITLES, Budget
from pipelines.compare.plan import Entrant

Reports = Mapping[str, Sequence[Mapping[str, Any]]]  # name of an experiment -> its evaluations' reports


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, minimum and maximum."""
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def collect_results(entrants: Sequence[Entrant], reports: Reports) -> list[dict[str, Any]]:
    """One result per budget, method, solver and NFE: the metrics of each seed, and their spread."""
    groups: dict[tuple[Budget, str], list[Entrant]] = {}
    for entrant in entrants:
        groups.setdefault((entrant.budget, entrant.method), []).append(entrant)
    results = []
    for (budget, method), same in groups.items():
        by_point: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for entrant in same:
            for entry in (entry for report in reports[entrant.experiment.name] for entry in report["samples"]):
                metrics = {key: entry[key] for key in ("frechet", "frechet_standard_error", "accuracy")}
                point = entry["solver"], entry["num_function_evaluations"]
                by_point.setdefault(point, []).append({"seed": entrant.seed, **metrics})
        for (solver, nfe), by_seed in sorted(by_point.items()):
            results.append(
                {
                    "budget": budget,
                    "method": method,
                    "num_steps": same[0].num_steps,
                    "solver": solver,
                    "nfe": nfe,
                    **{key: spread([seed[key] for seed in by_seed]) for key in ("frechet", "accuracy")},
                    "by_seed": by_seed,
                }
            )
    return results


def curves_of(report: Mapping[str, Any], budget: Budget) -> dict[str, list[dict[str, Any]]]:
    """{title: results in order of NFE} of a budget: one curve per method, and one more per further solver."""
    curves: dict[str, list[dict[str, Any]]] = {}
    with_heun = {result["method"] for result in report["results"] if result["solver"] == "heun"}
    for result in report["results"]:
        if result["budget"] == budget:
            title = title_of(result["method"])
            if result["method"] in with_heun:
                title = f"{title}, {result['solver'].capitalize()}"
            curves.setdefault(title, []).append(result)
    return curves


def title_of(method: str) -> str:
    """The method's name in tables and plots."""
    return TITLES.get(method, method)


def findings(report: Mapping[str, Any]) -> list[str]:
    """Sentences on the smallest distances, in one evaluation and in any number, compared with the baseline."""
    sentences = []
    few, many = min(report["nfe"]), max(report["nfe"])
    for budget in report["budgets"]:
        results = [result for result in report["results"] if result["budget"] == budget]
        by_point = {(r["method"], r["nfe"]): r for r in results if r["solver"] == "euler"}
        in_few = [result for (_, nfe), result in by_point.items() if nfe == few]
        best = min(in_few, key=lambda result: result["frechet"]["mean"])
        start = (
            f"At {BUDGET_TITLES[budget]}, {title_of(best['method'])} has the smallest mean distance in {_evaluations(few)}, "
            f"{_cell(best['frechet'], 2)}"
        )
        baseline = report["baseline"]
        if best["method"] != baseline and (baseline, few) in by_point:
            in_many, in_one = (_ratio(best, by_point[baseline, nfe]) for nfe in (many, few))
            start += (
                f": {_cell(in_many, 2)} times that of {title_of(baseline)} in {_evaluations(many)}, and "
                f"{_cell(in_one, 2)} times its distance in {_evaluations(few)}"
            )
        least = min(results, key=lambda result: result["frechet"]["mean"])
        sentences.append(
            f"{start}. The smallest mean distance of all is {_cell(least['frechet'], 2)}, of {title_of(least['method'])} in "
            f"{_evaluations(least['nfe'])}."
        )
    return sentences


def _evaluations(nfe: int) -> str:
    return "one function evaluation" if nfe == 1 else f"{nfe} function evaluations"


def _ratio(result: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """Spread of the ratio of two results' distances, computed per seed."""
    pairs = zip(result["by_seed"], other["by_seed"], strict=True)
    return spread([ours["frechet"] / theirs["frechet"] for ours, theirs in pairs])


def table(report: Mapping[str, Any]) -> str:
    """The tables of quality by NFE and of costs, with the findings."""
    num_seeds, few, many = len(report["seeds"]), min(report["nfe"]), max(report["nfe"])
    held_out, rebuilt = report["held_out"], report["reconstruction"]
    lines = [
        f"{report['distance']} of {report['num_samples']} samples to the training images (not FID), by function evaluations "
        f"(NFE) per image: mean over {num_seeds} seed{'s' * (num_seeds > 1)}, and the range. Held-out real images (the "
        f"floor) {held_out['frechet']:.3f}, the autoencoder's reconstructions {rebuilt['frechet']:.3f}; their "
        f"class accuracies {held_out['accuracy']:.3f} and {rebuilt['accuracy']:.3f}.",
        "",
        f"| budget | method | training steps | {' | '.join(map(str, report['nfe']))} | accuracy at {few} | at {many} |",
        f"|---|---|---|{'---|' * len(report['nfe'])}---|---|",
    ]
    for budget in report["budgets"]:
        for title, curve in curves_of(report, budget).items():
            by_nfe = {result["nfe"]: result for result in curve}
            cells = [_cell(by_nfe.get(nfe, {}).get("frechet"), 2) for nfe in report["nfe"]]
            cells += [_cell(by_nfe.get(nfe, {}).get("accuracy"), 3) for nfe in (few, many)]
            lines.append(f"| {BUDGET_TITLES[budget]} | {title} | {curve[0]['num_steps']} | {' | '.join(cells)} |")
    lines += ["", *findings(report), "", f"Costs, on {report['machine']}:", ""]
    lines += [
        f"| method | parameters (in training) | GFLOPs per step | s per step | ms per image at {few} NFE | at {many} NFE |",
        "|---|---|---|---|---|---|",
    ]
    for cost in report["costs"]:
        milliseconds = [cost["milliseconds_per_image"][str(nfe)] for nfe in (few, many)]
        lines.append(
            f"| {title_of(cost['method'])} | {cost['num_parameters_sampling'] / 1e6:.2f} M "
            f"({cost['num_parameters'] / 1e6:.2f} M) | {cost['step_flops'] / 1e9:.1f} | {cost['seconds_per_step']:.3f} "
            f"| {milliseconds[0]:.1f} | {milliseconds[1]:.1f} |"
        )
    starts = ", ".join(title_of(method) for method in report["methods"] if method in report["from_baseline"])
    if starts:
        lines += [
            "",
            f"Half of the budget of {starts} trained {title_of(report['baseline'])}; costs are of the other half.",
        ]
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, float] | None, digits: int) -> str:
    if value is None:
        return "—"
    mean, low, high = (f"{value[key]:.{digits}f}" for key in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low}–{high})"
