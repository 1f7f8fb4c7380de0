"""Checks that a figure is the same wherever it appears: on two pages, or on a page and in the code."""

import re

from meanflow_core.presets import PRESETS
from tests.support.readme import text_of

GALLERY, COMPARISON, MEASURED = "docs/gallery.md", "docs/benchmarks/comparison.md", "docs/benchmarks/measured.md"


def rows(page: str, heading: str) -> dict[tuple[str, str], dict[str, str]]:
    """{(first cell, second cell): {heading: cell}} of the table with this text in its heading.

    An empty first cell means the one above.
    """
    tables = re.findall(r"(?:^\|.*\n)+", text_of(page), re.MULTILINE)
    [table] = [table for table in tables if heading in table.splitlines()[0]]
    names, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    first, result = "", {}
    for line in lines:
        first = line[0] or first
        result[first, line[1]] = dict(zip(names, line, strict=True))
    return result


def figures(page: str, pattern: str) -> tuple[str, ...]:
    """The groups of a pattern, which must occur once on a page. A space also matches a line break."""
    [match] = re.finditer(pattern.replace(" ", r"\s+"), text_of(page))
    return match.groups()


def percent(value: str) -> str:
    return f"{100 * float(value):.0f}"


def test_clothes():
    sampled, held_out = figures("README.md", r"a probe recognises (\d+) % of the samples, and (\d+) % of held-out")
    table = rows(GALLERY, "FD-EfficientNet-Lite0")
    assert sampled == percent(table["MeanFlow", "1"]["probe accuracy"])
    assert held_out == percent(table["held-out photographs (the floor)", ""]["probe accuracy"])
    generator, autoencoder = figures("README.md", r"what (\d+) minutes of training on two CPU cores, after (\d+) for")
    assert figures(GALLERY, r"in (\d+) minutes\. Generator: .* in (\d+) minutes") == (autoencoder, generator)
    minutes, decibels = figures("docs/tutorials/own-images.ipynb", r"it takes (\d+) minutes and reaches ([\d.]+) dB")
    assert minutes == autoencoder
    assert figures(GALLERY, r"are at 69 \(([\d.]+) dB\)") == (decibels,)


def test_fashion():
    sampled, held_out, distance, one, many, steps = figures(
        "README.md",
        r"a judge recognises (\d+) %, and (\d+) % of held-out images; distance ([\d.]+ ± [\d.]+), "
        r"flow matching ([\d.]+) in 1 step and ([\d.]+) in (\d+)",
    )
    table = rows(GALLERY, "network calls | distance")
    flow = "flow matching, the same network, steps and guidance"
    assert sampled == percent(table["MeanFlow", "1"]["accuracy"])
    assert held_out == percent(table["held-out images (the floor)", ""]["accuracy"])
    assert distance == table["MeanFlow", "1"]["distance"]
    assert [one, many] == [table[flow, calls]["distance"].split(" ± ")[0] for calls in ("1", steps)]


def test_comparison():
    meanflow, eight, eight_steps, sixteen, sixteen_steps = figures(
        "README.md", r"MeanFlow ([\d.]+) in 1 step; flow matching ([\d.]+) in (\d+) steps, ([\d.]+) in (\d+)"
    )
    table = rows(COMPARISON, "distance at equal steps")
    euler = table["flow matching, Euler", "1,200"]
    assert meanflow == table["MeanFlow", "1,200"]["1"].split()[0]
    assert [eight, sixteen] == [euler[eight_steps], euler[sixteen_steps]]
    stated = r"one call of MeanFlow \(([\d.]+)\) is about as good as 8 to 16 of flow matching \(([\d.]+) and ([\d.]+)\)"
    assert figures(COMPARISON, stated) == (meanflow, eight, sixteen)
    assert float(eight) >= float(meanflow) >= float(sixteen)
    one, four, eight = figures(
        COMPARISON, r"one call of MeanFlow \(([\d.]+)\) is between 4 and 8 of flow matching \(([\d.]+) and ([\d.]+)\)"
    )
    assert one == rows(COMPARISON, "at equal training FLOPs")["MeanFlow", "951"]["1"].split()[0]
    assert [four, eight] == [euler["4"], euler["8"]]
    assert float(four) >= float(one) >= float(eight)


def test_published_fids():
    table = rows("README.md", "paper | ours")
    values = table["MeanFlow-B/2; -L/2; -XL/2", "1"]["paper"].split("; ")
    for name, value in zip(("b2", "l2", "xl2"), values, strict=True):
        assert f"FID {value}" in PRESETS[name].__doc__
    assert f"and {table['MeanFlow-XL/2', '2']['paper']} at 2 NFE" in PRESETS["xl2"].__doc__
    assert f"FID {table['improved MeanFlow-XL/2', '1']['paper']}" in PRESETS["imf_xl2"].__doc__


def test_agreement_with_the_authors_code():
    [stated] = figures("README.md", r"numbers of the authors' code: (1e-\d) in float32")
    [measured] = figures(MEASURED, r"agree within ([\d.]+e-\d) relative, in float32")
    assert float(stated) == float(measured)


def test_minutes_of_the_demo():
    [measured] = figures(MEASURED, r"`make demo` takes (\d+) minutes")
    assert figures("README.md", r"`make demo` runs every stage on drawn shapes, in about (\d+) minutes") == (measured,)
    assert f"about {measured} minutes on two CPU cores" in text_of("pipelines/demo/run.py")


def test_numbers_of_workers_and_steps_of_determinism_are_those_of_its_test():
    page, test = "docs/explanation/determinism.md", "tests/core/test_world_sizes.py"
    *workers, steps = figures(page, r"number of workers: (\d), (\d), (\d); DDP or FSDP2 \| after (\d+) steps")
    assert figures(test, r"SAMPLES_PER_PASS = {(\d): \d, (\d): \d, (\d): \d}") == tuple(workers)
    assert figures(test, r"NUM_STEPS, SAVE_STEP = (\d+),") == (steps,)
