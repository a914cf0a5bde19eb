"""For verbs that take several containers: each is tried, each failure is reported, one failure fails the command."""

from __future__ import annotations

from vmsandbox.cli import output
from vmsandbox.errors import SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def each(names: list[str], act: Callable[[str], str | None], *, debug: bool) -> int:
    """Call `act` with every name and print what it answers (the name itself for None)."""
    failed = 0
    for name in names:
        try:
            answer = act(name)
        except SandboxError as error:
            output.report(error, debug=debug)
            failed = output.FAILED
        else:
            print(name if answer is None else answer, flush=True)
    return failed
