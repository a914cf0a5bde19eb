"""The errors an RPC can answer with; `code` is what the host branches on.

The codes are those of the host's own error tree, so that the host can rebuild the class.  Anything else that
is raised inside an RPC is a bug and reaches the host as "internal".
"""

from __future__ import annotations


class AgentError(Exception):
    """Root of everything the agent raises on purpose; the message is one line for a user."""

    code = "internal"

    def __init__(self, message: str, *, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class NotFoundError(AgentError):
    code = "not-found"


class AlreadyExistsError(AgentError):
    code = "already-exists"


class InvalidStateError(AgentError):
    """The subject is in a state in which the call makes no sense."""

    code = "invalid-state"

    def __init__(self, subject: str, *, state: str, wanted: str) -> None:
        super().__init__(f"cannot {wanted} {subject}: it is {state}")
        self.subject = subject
        self.state = state
        self.wanted = wanted


class InvalidArgumentError(AgentError):
    code = "invalid-argument"


class CommandNotFoundError(AgentError):
    code = "command-not-found"


class CommandNotExecutableError(AgentError):
    code = "command-not-executable"


class UnsupportedError(AgentError):
    code = "unsupported"


class ExhaustedError(AgentError):
    code = "exhausted"


class UnavailableError(AgentError):
    """What was being waited for will not come: displaced, removed or shut down."""

    code = "unavailable"


class TimedOutError(AgentError):
    code = "timed-out"
