"""`vmsandbox update`: other limits for running containers."""

from __future__ import annotations

import sys

from vmsandbox.arguments import Parser
from vmsandbox.cli.verbs._each import each
from vmsandbox.cli.verbs._running import ask
from vmsandbox.errors import InvalidArgumentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from vmsandbox.cli.main import Options

LIMITS = ("cpus", "memory", "pids_limit", "cpu_shares", "cpuset_cpus")


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="vmsandbox update",
        allow_abbrev=False,
        description="Changes the limits of containers while they run; the virtual machine grows and shrinks with them.",
    )
    add = made.add_argument
    add("--cpus", type=float, default=None, metavar="N", help="how much CPU time, and so how many vCPUs; 0: no limit")
    add("-m", "--memory", default=None, metavar="SIZE", help="limit of the container's memory, as 512m")
    add("--pids-limit", type=int, default=None, metavar="N", help="0 or -1: no limit")
    add("--cpu-shares", type=int, default=None, metavar="N", help="weight among the pod's containers; 0: as without")
    add("--cpuset-cpus", default=None, metavar="LIST", help="vCPUs of the guest")
    add("containers", nargs="+", metavar="CONTAINER")
    return made


def main(options: Options, argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    chosen = {name: value for name in LIMITS if (value := getattr(arguments, name)) is not None}
    if not chosen:
        raise InvalidArgumentError("nothing to update: give a limit, as '--memory 512m'")
    roots = options.roots()

    def update(name: str) -> None:
        answer = ask(roots, name, {"verb": "update", "options": chosen}, wanted="update")
        for text in kept(answer):
            print(f"vmsandbox: {name}: {text}", file=sys.stderr)

    return each(arguments.containers, update, debug=options.debug)


def kept(answer: dict[str, Any]) -> list[str]:
    """What the limits no longer need and the guest could not give back."""
    texts = []
    if answer["memory_kept_mib"]:
        texts.append(
            f"the virtual machine could not give back {answer['memory_kept_mib']} MiB yet: "
            f"it has {answer['memory_mib']} MiB"
        )
    if answer["cpus_kept"]:
        texts.append(
            f"the virtual machine keeps {answer['cpus']} vCPUs, {answer['cpus_kept']} of them offline: "
            "this acceleration cannot take vCPUs out"
        )
    return texts
