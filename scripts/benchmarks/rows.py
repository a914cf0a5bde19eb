"""Rows, the measurements that yield them, and the arithmetic from samples to what is printed.  Nothing here measures.

A measurement is a function that is called once a round and answers one value for each of its rows; modules register
theirs with `measurement`.  Rows that name another row in `against` get a ratio to it, and what they need for that is
measured in the same rounds, so that whatever the machine does meanwhile weighs on both.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from scripts.benchmarks.workplace import Workplace

Unit = Literal["s", "us", "MiB", "%", "MiB/s"]

#: what every row of a verb's duration is compared with, beside its own reference
YARDSTICKS = ("cold_boot_floor", "crun_run", "podman_run")


class MissingError(Exception):
    """A row cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Row:
    """A figure by name.  `against` is the row its ratio is to; `compared` adds a ratio to each yardstick."""

    name: str
    unit: Unit
    text: str
    against: str | None = None
    compared: bool = False


@dataclass(frozen=True)
class Measurement:
    """A function that measures some rows at once, and how often it has to be called at most."""

    rows: tuple[Row, ...]
    sample: Callable[[Workplace], Mapping[str, float]]
    most_runs: int | None
    warm_up: bool

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(row.name for row in self.rows)


@dataclass(frozen=True)
class Figure:
    """A row of the report; without samples `value` and `ratio` are None."""

    name: str
    unit: str
    value: float | None
    against: str | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    text: str = ""

    def document(self) -> dict[str, object]:
        """The row as `--format json` prints it."""
        return {
            "name": self.name,
            "value": _rounded(self.value),
            "unit": self.unit,
            "against": self.against,
            "ratio": _rounded(self.ratio),
        }


REGISTERED: list[Measurement] = []


def measurement(
    *rows: Row, most_runs: int | None = None, warm_up: bool = True
) -> Callable[[Callable[[Workplace], Mapping[str, float]]], Callable[[Workplace], Mapping[str, float]]]:
    """Register a function as what measures `rows`.

    `most_runs` caps the rounds of one that takes long; without `warm_up` its first call already counts.
    """

    def register(sample: Callable[[Workplace], Mapping[str, float]]) -> Callable[[Workplace], Mapping[str, float]]:
        REGISTERED.append(Measurement(rows, sample, most_runs, warm_up))
        return sample

    return register


def chosen(only: Sequence[str], registered: Sequence[Measurement] = REGISTERED) -> list[Measurement]:
    """The measurements for the rows in `only` (all if there are none), their parts and what those are compared with.

    Raises `KeyError` with the first name that no measurement has.
    """
    if not only:
        return list(registered)
    homes = {row.name: found for found in registered for row in found.rows}
    wanted: set[str] = set()
    parts = tuple(f"{name}." for name in only)
    queue = [*only, *(name for name in homes if name.startswith(parts))]
    while queue:
        name = queue.pop()
        if name in wanted:
            continue
        wanted.add(name)
        for row in homes[name].rows:
            if row.name == name:
                queue += _references(row, homes)
    return [found for found in registered if wanted & set(found.names)]


def shown(only: Sequence[str], registered: Sequence[Measurement]) -> list[Row]:
    """The rows to print: those asked for, their parts and references, in the order of registration."""
    rows = [row for found in registered for row in found.rows]
    if not only:
        return rows
    known = {row.name: row for row in rows}
    wanted = set(only)
    for name in only:
        wanted.update(_references(known[name], known))
    parts = tuple(f"{name}." for name in only)
    return [row for row in rows if row.name in wanted or row.name.startswith(parts)]


def _references(row: Row, known: Iterable[str]) -> list[str]:
    names = [row.against] if row.against else []
    names += YARDSTICKS if row.compared else ()
    return [name for name in names if name in known and name != row.name]


def figures(rows: Sequence[Row], samples: Mapping[str, Sequence[float]]) -> list[Figure]:
    """Medians and ratios.  Ratios to yardsticks become rows of their own, called ``ROW.vs_YARDSTICK``."""
    medians = {name: statistics.median(values) for name, values in samples.items() if values}
    found = []
    for row in rows:
        value = medians.get(row.name)
        values = samples.get(row.name) or ()
        found.append(
            Figure(
                name=row.name,
                unit=row.unit,
                value=value,
                against=row.against,
                ratio=ratio(value, medians.get(row.against or "")),
                low=min(values, default=None),
                high=max(values, default=None),
                text=row.text,
            )
        )
        for yardstick in YARDSTICKS if row.compared else ():
            if yardstick not in (row.name, row.against) and yardstick in medians and value is not None:
                found.append(
                    Figure(
                        name=f"{row.name}.vs_{yardstick}",
                        unit=row.unit,
                        value=value,
                        against=yardstick,
                        ratio=ratio(value, medians[yardstick]),
                    )
                )
    return found


def ratio(value: float | None, reference: float | None) -> float | None:
    """How many times the reference; None where either is missing or the reference is nothing."""
    return value / reference if value is not None and reference else None


def _rounded(value: float | None) -> float | None:
    """Five significant digits: more than any of this is worth."""
    return None if value is None else float(f"{value:.5g}")
