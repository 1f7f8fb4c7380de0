"""Text for a terminal: titled sections of aligned lines, and numbers as people read them."""

from collections.abc import Sequence


def section(title: str, lines: Sequence[tuple[str, str]]) -> str:
    """A title, and below it a line for each (name, text), the texts aligned; ends without a newline."""
    width = max(len(name) for name, _ in lines)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in lines)])


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A title, and below it columns aligned to the right, as many in each row as in the header."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


def counted(number: int, noun: str) -> str:
    """1 class, 1,000 classes."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def scaled(value: float, unit: str) -> str:
    """Four digits and a prefix of a thousand's power: 259.2 TFLOP, 13.53 GB, 676.4 M."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    power = 0
    while value >= 999.95 and power < len(prefixes) - 1:
        value, power = value / 1000.0, power + 1
    decimals = 0 if power == 0 else 1 if value >= 100 else 2
    return f"{value:.{decimals}f} {prefixes[power]}{unit}".rstrip()


def span(least: int, most: int) -> str:
    """Whole numbers from one to another: 8, 8 or 9, 8 to 16."""
    return (
        f"{least:,}" if least == most else f"{least:,} or {most:,}" if least + 1 == most else f"{least:,} to {most:,}"
    )


def duration(seconds: float) -> str:
    """2.7 s, 54 s, 7.1 minutes, 5.20 hours, 9.0 days."""
    if seconds < 10.0:
        return f"{seconds:.1f} s"
    if seconds < 120.0:
        return f"{seconds:.0f} s"
    if seconds < 7200.0:
        return f"{seconds / 60.0:.1f} minutes"
    hours = seconds / 3600.0
    return f"{hours / 24.0:,.1f} days" if hours >= 48.0 else f"{hours:,.2f} hours"
