"""`vmsandbox create`: a container with all it needs, whose command waits for `vmsandbox start`."""

from __future__ import annotations

from vmsandbox.cli.verbs import run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmsandbox.cli.main import Options


def main(options: Options, argv: list[str]) -> int:
    """As `run`, but for the start; prints the id."""
    return run.main(options, argv, verb="create")
