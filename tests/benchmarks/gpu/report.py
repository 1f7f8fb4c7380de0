"""Figures of a run on one device, written after each part as JSON and as Markdown tables."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch


class Figure(NamedTuple):
    """One measured value."""

    name: str
    value: float
    unit: str = ""
    limit: float | None = None
    """The largest value that is right, if there is one."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all parts run on."""

    device: torch.device
    is_toy: bool
    """Tiny networks and batches, to test the script itself."""


Part = Callable[[Setup], Iterator[Figure]]


@dataclass
class PartResult:
    """The figures of one part, possibly not all of them."""

    title: str
    figures: list[Figure] = field(default_factory=list)
    seconds: float = 0.0
    problem: str = ""
    """Why figures are missing; empty if the part is complete."""
    has_failed: bool = False
    """Whether it ended with an error, not because its time was used up."""


def run_part(title: str, part: Part, setup: Setup, limit_seconds: float) -> PartResult:
    """Runs a part until it ends, fails, or has used its time: it is asked for no figure after that."""
    result, started = PartResult(title), time.monotonic()
    try:
        for figure in part(setup):
            result.figures.append(figure)
            print(f"  {figure.name:58s} {figure.value:10.4g} {figure.unit}", flush=True)
            if time.monotonic() - started > limit_seconds:
                result.problem = f"stopped after {limit_seconds:.0f} s"
                break
    except Exception as error:  # the other parts still run
        traceback.print_exc()
        result.problem, result.has_failed = f"{type(error).__name__}: {error}".splitlines()[0], True
    result.seconds = time.monotonic() - started
    return result


def missed(results: list[PartResult]) -> list[str]:
    """The figures above their limits, and the parts that failed."""
    found = [
        f"{result.title}: {figure.name} is {figure.value:.3g}, limit {figure.limit:g}"
        for result in results
        for figure in result.figures
        if figure.limit is not None and not figure.value <= figure.limit
    ]
    return found + [f"{result.title}: {result.problem}" for result in results if result.has_failed]


def write(results: list[PartResult], machine: dict[str, object], json_file: Path, markdown_file: Path) -> None:
    """Writes both files."""
    for path in (json_file, markdown_file):
        path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "parts": [asdict(result) for result in results], "missed": missed(results)}
    json_file.write_text(json.dumps(content, indent=2) + "\n")
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    for result in results:
        lines += [f"## {result.title}", "", "| | | limit |", "|---|---|---|"]
        for name, value, unit, limit in result.figures:
            lines.append(f"| {name} | {value:.4g} {unit} | {'' if limit is None else f'{limit:g}'} |")
        lines += ["", f"{result.seconds:.0f} s. {result.problem}".rstrip(), ""]
    markdown_file.write_text("\n".join(lines))
