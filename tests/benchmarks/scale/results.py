"""Experiments, their measurement in processes of their own, and the table of results."""

import contextlib
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

IMAGENET = 1_281_167  # images of ImageNet's training set
MAX_GROWTH = 1.25  # exponent: linear, and a quarter for noise on a shared machine
MIN_CPU_SECONDS = 1e-3  # the growth of less is noise
MAX_PEAK_MEGABYTES = 2000.0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Time of one call."""

    seconds: float
    """Wall time: the median of repeated calls."""
    cpu_seconds: float
    """CPU time of this process: the mean of repeated calls."""
    fastest_seconds: float
    """Wall time of the fastest call. Limits apply to it, because other jobs share the machine."""
    note: str = ""
    """Other figures of the call."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Something to measure at several sizes."""

    measure: Callable[[int], dict[str, Timing]]
    """Maps a size to the timing of each step."""
    sizes: tuple[int, ...]
    """In ascending order."""
    unit: str
    """What a size counts."""
    simulated: str
    """What stands in for files, devices and other machines."""
    limits: dict[str, tuple[int, float]] = field(default_factory=dict)
    """{step: (size, seconds that its fastest call may take)}."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    experiment: str
    step: str
    size: int
    unit: str
    seconds: float
    cpu_seconds: float
    fastest_seconds: float
    peak_megabytes: float
    """Peak memory of the process that measured all steps of the experiment at this size."""
    growth: float | None
    """Exponent of the CPU time between the smallest and the largest size; for the largest only."""
    note: str
    problems: list[str]
    """Limits that the row exceeds."""


def fractions(size: int) -> tuple[int, int, int]:
    """A quarter, a half and all of a size."""
    return size // 4, size // 2, size


def scaled(count: int, num_images: int, least: int) -> int:
    """The part of `count` that belongs to `num_images` instead of ImageNet's, at least `least`."""
    return max(least, count * num_images // IMAGENET)


@contextlib.contextmanager
def timed(timings: dict[str, Timing], step: str) -> Iterator[list[str]]:
    """Adds the timing of a `with` block. Yields a list that receives notes."""
    notes: list[str] = []
    start, cpu_start = time.perf_counter(), time.process_time()
    yield notes
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    timings[step] = Timing(seconds=seconds, cpu_seconds=cpu_seconds, fastest_seconds=seconds, note=", ".join(notes))


def repeated(function: Callable[[int], object], repeats: int, warmup: int = 3, pause_seconds: float = 0.0) -> Timing:
    """The timing of function(number of the call), with a pause before each call."""
    seconds: list[float] = []
    for number in range(warmup + repeats):
        if number == warmup:
            cpu_start = time.process_time()
        time.sleep(pause_seconds)
        start = time.perf_counter()
        function(number)
        seconds.append(time.perf_counter() - start)
    cpu_seconds = (time.process_time() - cpu_start) / repeats
    seconds = seconds[warmup:]
    note = f"fastest {format_seconds(min(seconds))}"
    return Timing(seconds=statistics.median(seconds), cpu_seconds=cpu_seconds, fastest_seconds=min(seconds), note=note)


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a forked process and returns its result. Exits if it fails."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*arguments)))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise SystemExit(f"{getattr(function, '__name__', 'a part')}{arguments} failed") from None
    process.join()
    return result


def run_experiment(name: str, experiment: Experiment) -> list[Row]:
    """Measures every size in a process of its own, prints what it finds, and returns the rows of the table."""
    print(f"{name}; simulated: {experiment.simulated}", flush=True)
    rows: list[Row] = []
    first: dict[str, Timing] = {}
    for size in experiment.sizes:
        timings, peak = in_process(_measure, experiment, size)
        first = first or timings
        for step, timing in timings.items():
            growth = None
            if size == experiment.sizes[-1] and timing.cpu_seconds >= MIN_CPU_SECONDS:
                growth = math.log(timing.cpu_seconds / first[step].cpu_seconds) / math.log(size / experiment.sizes[0])
            row = Row(
                experiment=name, step=step, size=size, unit=experiment.unit, **vars(timing), peak_megabytes=peak,
                growth=growth, problems=_problems(experiment, step, size, timing, peak, growth),
            )  # fmt: skip
            print(f"  {_progress(row)}", flush=True)
            rows.append(row)
    return rows


def _measure(experiment: Experiment, size: int) -> tuple[dict[str, Timing], float]:
    timings = experiment.measure(size)
    return timings, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _problems(
    experiment: Experiment, step: str, size: int, timing: Timing, peak: float, growth: float | None
) -> list[str]:
    problems = []
    limited_size, limit = experiment.limits.get(step, (0, math.inf))
    if size == limited_size and timing.fastest_seconds > limit:
        problems.append(f"above {format_seconds(limit)}")
    if peak > MAX_PEAK_MEGABYTES:
        problems.append(f"above {MAX_PEAK_MEGABYTES:.0f} MB")
    if growth is not None and growth > MAX_GROWTH:
        problems.append("above linear")
    return problems


def format_seconds(seconds: float) -> str:
    """In seconds or milliseconds."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _progress(row: Row) -> str:
    times = f"{format_seconds(row.seconds)}, CPU {format_seconds(row.cpu_seconds)}, {row.peak_megabytes:,.0f} MB"
    return f"{row.size:,} {row.unit}: {row.step}: {times} {_verdict([row]) if row.problems else ''}".rstrip()


def _verdict(rows: list[Row]) -> str:
    problems = [f"{problem} at {row.size:,}" for row in rows for problem in row.problems]
    return f"SHORT: {', '.join(problems)}" if problems else "ok"


def _table_line(rows: list[Row]) -> str:
    """The line of a step, from its rows at all sizes."""
    last = rows[-1]
    cells = [
        f"{last.experiment}: {last.step}",
        f"{' / '.join(f'{row.size:,}' for row in rows)} {last.unit}",
        " / ".join(format_seconds(row.seconds) for row in rows),
        " / ".join(format_seconds(row.cpu_seconds) for row in rows),
        f"{last.peak_megabytes:,.0f}",
        "" if last.growth is None else f"{last.growth:.2f}",
        _verdict(rows),
        last.note,
    ]
    return f"| {' | '.join(cells)} |"


def markdown(rows: list[Row]) -> str:
    """The table of results: one line per step."""
    header = ["part", "size", "time", "driver's CPU time", "driver's peak MB", "growth", "wanted", "also"]
    steps: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        steps.setdefault((row.experiment, row.step), []).append(row)
    return "\n".join([f"| {' | '.join(header)} |", "|" + "---|" * len(header), *map(_table_line, steps.values())])
