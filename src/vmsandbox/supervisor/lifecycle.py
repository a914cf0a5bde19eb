"""The states of a container and which verb leads where: one table, one pure function."""

from __future__ import annotations

from typing import Literal

from vmsandbox.errors import InvalidStateError

Status = Literal["creating", "created", "running", "paused", "stopped"]

#: (state, verb) -> next state; what is not here is refused
TRANSITIONS: dict[tuple[Status, str], Status] = {
    ("creating", "create"): "created",
    ("creating", "run"): "running",
    ("created", "start"): "running",
    ("created", "kill"): "created",
    ("created", "end"): "stopped",
    ("created", "exec"): "created",
    ("created", "update"): "created",
    ("created", "top"): "created",
    ("created", "stats"): "created",
    ("created", "copy"): "created",
    ("running", "kill"): "running",
    ("running", "exec"): "running",
    ("running", "update"): "running",
    ("running", "top"): "running",
    ("running", "stats"): "running",
    ("running", "copy"): "running",
    ("running", "pause"): "paused",
    ("running", "end"): "stopped",
    ("paused", "resume"): "running",
    ("paused", "kill"): "paused",
    ("paused", "update"): "paused",
    ("paused", "top"): "paused",
    ("paused", "stats"): "paused",
    ("paused", "copy"): "paused",
    ("paused", "end"): "stopped",
    ("stopped", "start"): "running",
    ("stopped", "delete"): "stopped",
}


def advance(subject: str, state: Status, verb: str) -> Status:
    """The state after `verb`; raises `InvalidStateError` naming state and verb where it makes no sense."""
    try:
        return TRANSITIONS[state, verb]
    except KeyError:
        raise InvalidStateError(subject, state=state, wanted=verb) from None
