"""One request about a container that has to be running."""

from __future__ import annotations

from vmsandbox import records
from vmsandbox.cli import client, launch
from vmsandbox.errors import InvalidStateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsandbox.paths import Roots


def stopped_error(name: str, *, wanted: str) -> InvalidStateError:
    """For what only a container that runs can be asked."""
    return InvalidStateError(
        f"container '{name}'", state="stopped", wanted=wanted, remedy="'vmsandbox start' starts it again"
    )


def ask(roots: Roots, name: str, request: dict[str, Any], *, wanted: str) -> dict[str, Any]:
    """Send a request about the container called `name` to its pod; `InvalidStateError` if it is stopped."""

    def attempt() -> dict[str, Any]:
        container = records.load(roots, records.resolve(roots, name))
        return ask_about(roots, container, request, name=name, wanted=wanted)

    return client.insisting(attempt)


def ask_about(
    roots: Roots, container: records.Container, request: dict[str, Any], *, name: str, wanted: str
) -> dict[str, Any]:
    """As `ask`, of a container that is known already."""
    stopped = stopped_error(name, wanted=wanted)
    if container.status() == "stopped":
        raise stopped
    try:
        sock = launch.connect_or_take_over(roots, container.sandbox)
    except FileNotFoundError:
        raise stopped from None
    with sock:
        return client.request(sock, {**request, "container": container.id})
