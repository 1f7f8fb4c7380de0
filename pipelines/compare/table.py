"""The comparison's report as Markdown tables."""

from typing import Any

from pipelines.compare.methods import BUDGET_TITLES


def results_of(report: dict[str, Any], budget: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """{(method, solver): results in order of NFE} of a budget, in the order of the report's methods."""
    curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in report["results"]:
        if result["budget"] == budget:
            curves.setdefault((result["method"], result["solver"]), []).append(result)
    return {key: sorted(curve, key=lambda result: result["nfe"]) for key, curve in curves.items()}


def curve_title(report: dict[str, Any], method: str, solver: str) -> str:
    """The method's title, with the solver if the method has two."""
    title = next(entry["title"] for entry in report["methods"] if entry["name"] == method)
    solvers = {result["solver"] for result in report["results"] if result["method"] == method}
    return f"{title}, {solver.capitalize()}" if len(solvers) > 1 else str(title)


def table(report: dict[str, Any]) -> str:
    """The tables of quality by NFE, of ratios, and of costs."""
    seeds = len(report["seeds"])
    lines = [
        f"Fréchet distance of {report['num_samples']} samples to {report['num_train_images']} training images in the "
        f"features of the judge (not FID): mean over {seeds} seed{'s' * (seeds > 1)}, and the range.",
        f"Held-out real images (the floor) {report['held_out']['frechet']:.4f}, the autoencoder's reconstructions "
        f"{report['reconstruction']['frechet']:.4f}; their class accuracies {report['held_out']['accuracy']:.3f} and "
        f"{report['reconstruction']['accuracy']:.3f}.",
    ]
    lines += [*_quality(report), *_ratios(report), *_costs(report)]
    return "\n".join(lines) + "\n"


def _quality(report: dict[str, Any]) -> list[str]:
    lines = []
    for budget in report["budgets"]:
        title = BUDGET_TITLES[budget]
        for key, quantity in (("frechet", "Fréchet distance"), ("accuracy", "class accuracy")):
            lines += [
                "",
                f"**{quantity} at {title}**, by function evaluations (NFE) per image",
                "",
                f"| method | training steps | {' | '.join(map(str, report['nfe']))} |",
                f"|---|---|{'---|' * len(report['nfe'])}",
            ]
            for (method, solver), curve in results_of(report, budget).items():
                by_nfe = {result["nfe"]: result[key] for result in curve}
                cells = [_cell(by_nfe.get(nfe), 3) for nfe in report["nfe"]]
                steps = curve[0]["num_steps"]
                lines.append(f"| {curve_title(report, method, solver)} | {steps} | {' | '.join(cells)} |")
    return lines


def _ratios(report: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "**Fréchet distance at 1 NFE, divided by that of flow matching (Euler)**",
        "",
        f"| method | budget | at {report['nfe'][-1]} NFE | at 1 NFE |",
        "|---|---|---|---|",
    ]
    for ratio in report["ratios"]:
        title = next(entry["title"] for entry in report["methods"] if entry["name"] == ratio["method"])
        cells = [_cell(ratio[key], 2) for key in ("over_most_nfe", "over_one_nfe")]
        lines.append(f"| {title} | {BUDGET_TITLES[ratio['budget']]} | {' | '.join(cells)} |")
    return lines


def _costs(report: dict[str, Any]) -> list[str]:
    machine = report["hardware"]
    where = machine["gpu"] or f"{machine['num_threads']} thread of {machine['num_cores']} cores, {machine['processor']}"
    low, high = report["timed_nfe"][0], report["timed_nfe"][-1]
    lines = [
        "",
        f"**Costs**, on {where}, torch {machine['torch']}; {report['num_timed_images']} images are generated at a time; "
        f"decoding takes {report['decoder_milliseconds_per_image']:.1f} ms per image",
        "",
        f"| method | parameters (in training) | GFLOPs per step | s per step | ms per image at {low} NFE | at {high} NFE |",
        "|---|---|---|---|---|---|",
    ]
    for entry in report["methods"]:
        milliseconds = [entry["milliseconds_per_image"][str(nfe)] for nfe in (low, high)]
        lines.append(
            f"| {entry['title']} | {entry['num_parameters_sampling'] / 1e6:.2f} M ({entry['num_parameters'] / 1e6:.2f} M) "
            f"| {entry['step_flops'] / 1e9:.1f} | {entry['seconds_per_step']:.3f} "
            f"| {milliseconds[0]:.1f} | {milliseconds[1]:.1f} |"
        )
    return lines


def _cell(value: dict[str, float] | None, digits: int) -> str:
    if value is None:
        return "—"
    mean, low, high = (f"{value[key]:.{digits}f}" for key in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low}–{high})"
