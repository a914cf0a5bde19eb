"""`scripts/bench`: measure the rows asked for in interleaved rounds and print medians and ratios.

Interleaved means A B C A B C: what the machine does beside it, and its drift, weighs on every row alike.  The first
round is a warm-up and does not count.  It reports; it asserts nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING

from scripts.benchmarks import processes, report
from scripts.benchmarks.processes import CommandError
from scripts.benchmarks.rows import REGISTERED, MissingError, chosen, figures, shown
from scripts.benchmarks.workplace import Workplace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from scripts.benchmarks.rows import Measurement

#: modules with measurements, in the order of the report
MODULES = (
    *("native", "floor", "pods", "clones", "resizing", "streams"),
    *("sharing", "network", "crowd", "engines", "growth"),
)
RUNS = 5
UNIFIED = "/sys/fs/cgroup/unified"
#: set in the environment of the process that has a mount namespace of its own
APART = "VMSANDBOX_BENCH_APART"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0 whatever the figures are."""
    for name in MODULES:
        import_module(f"scripts.benchmarks.{name}")
    options = parser().parse_args(arguments)
    if options.list:
        for found in REGISTERED:
            for row in found.rows:
                print(f"{row.name:<28} {row.text}")
        return 0
    only = [name for part in options.only for name in part.split(",") if name]
    try:
        measurements = chosen(only)
    except KeyError as error:
        print(f"bench: no row {error}: '--list' shows them", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("bench: runs as root: virtual machines and crun need it", file=sys.stderr)
        return 2
    apart()
    processes.become_subreaper()
    signal.signal(signal.SIGTERM, _interrupt)
    with Workplace(data_root=options.data_root) as place:
        samples, reasons = measure(place, measurements, runs=options.runs)
    for line in report.missing(reasons):
        print(line, file=sys.stderr)
    result = figures(shown(only, measurements), samples)
    print(report.as_json(result) if options.format == "json" else report.as_text(result, runs=options.runs))
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.partition("\n")[0] if __doc__ else None)
    add = made.add_argument
    add("--only", action="append", default=[], metavar="ROW,...", help="these rows and their references")
    add("--runs", type=positive, default=RUNS, metavar="N", help="rounds that count (default %(default)s)")
    add("--format", choices=("text", "json"), default="text")
    add("--data-root", metavar="DIR", help="where the guest was built, if not in the default place")
    add("--list", action="store_true", help="show the names of the rows")
    return made


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def apart() -> None:
    """Go on in a mount namespace of our own, in which crun finds one version of control groups only."""
    if os.environ.get(APART) or not os.path.ismount(UNIFIED):
        return
    unshare = shutil.which("unshare")
    if unshare is None:
        return
    os.environ[APART] = "1"
    command = f'umount {UNIFIED}; exec "$@"'
    words = [sys.executable, "-m", "scripts.benchmarks", *sys.argv[1:]]
    os.execv(unshare, [unshare, "--mount", "--propagation", "private", "sh", "-c", command, "sh", *words])


def measure(
    place: Workplace, measurements: Sequence[Measurement], *, runs: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Samples by row, and why there are none of the rows that could not be measured."""
    samples: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    for turn in range(runs + 1):
        began = time.monotonic()
        for found in measurements:
            if reasons.keys() & set(found.names) or not is_due(found, turn):
                continue
            try:
                values = found.sample(place)
            except (MissingError, CommandError) as error:
                for name in found.names:
                    samples.pop(name, None)
                    reasons[name] = str(error)
                continue
            if turn > 0:
                for name, value in values.items():
                    samples.setdefault(name, []).append(value)
        title = "warm-up" if turn == 0 else f"round {turn} of {runs}"
        processes.note(f"{title}: {time.monotonic() - began:.0f} s")
    unmeasured = [name for found in measurements for name in found.names if name not in samples]
    return samples, {name: reasons.get(name, "it could not be told from what was seen") for name in unmeasured}


def is_due(found: Measurement, turn: int) -> bool:
    """Whether a measurement takes part in a round; round 0 is the warm-up."""
    if turn == 0:
        return found.warm_up
    return found.most_runs is None or turn <= found.most_runs


def _interrupt(number: int, _frame: object) -> NoReturn:
    """End as on ^C, so that everything is removed."""
    raise KeyboardInterrupt(signal.Signals(number).name)
