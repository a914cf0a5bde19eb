"""Prints figures, for people or for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scripts.benchmarks.rows import Figure

DIGITS = {"s": 3, "us": 0, "MiB": 1, "%": 2, "MiB/s": 1}


def as_json(figures: Sequence[Figure]) -> str:
    """One object: ``{"rows": [{"name", "value", "unit", "against", "ratio"}]}``."""
    return json.dumps({"rows": [figure.document() for figure in figures]}, indent=2)


def as_text(figures: Sequence[Figure], *, runs: int) -> str:
    """A table of medians with their range, and below it what each row is."""
    lines = [f"medians of {runs} interleaved runs", ""]
    cells = [("row", "median", "min", "max", "ratio")]
    cells += [_cells(figure) for figure in figures]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    for row in cells:
        line = "  ".join(
            cell.ljust(width) if column in (0, 4) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(line.rstrip())
    lines.append("")
    lines += [f"{figure.name.ljust(widths[0])}  {figure.text}" for figure in figures if figure.text]
    return "\n".join(lines)


def _cells(figure: Figure) -> tuple[str, str, str, str, str]:
    ratio = f"{figure.ratio:.2f} x {figure.against}" if figure.ratio is not None else ""
    if figure.value is None:
        return figure.name, "missing", "", "", ratio
    digits = DIGITS[figure.unit]
    value = f"{figure.value:.{digits}f} {figure.unit}"
    if figure.low is None or figure.high is None:
        return figure.name, value, "", "", ratio
    return figure.name, value, f"{figure.low:.{digits}f}", f"{figure.high:.{digits}f}", ratio


def missing(reasons: Mapping[str, str]) -> list[str]:
    """What is said about rows that could not be measured."""
    return [f"bench: no '{name}': {reason}" for name, reason in reasons.items()]
