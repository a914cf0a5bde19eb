"""The errors a caller can tell apart, and the codes that carry them across processes.

A class exists only where some caller branches on it.  Messages are one line, lower case, without a full
stop, values in quotes, and say what failed, why, and where it helps what to do.  Stdlib only: the thin
client imports this module.
"""

from __future__ import annotations

import errno


class SandboxError(Exception):
    """Root of everything vmsandbox raises on purpose.

    `code` is the machine-readable name that crosses process boundaries; `detail` is longer evidence
    (console tail, QEMU's stderr) that is shown only with ``--debug``.
    """

    code = "internal"

    def __init__(self, message: str, *, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class NotFoundError(SandboxError):
    """The thing named does not exist."""

    code = "not-found"


class AlreadyExistsError(SandboxError):
    """The name or id is taken; the message names the holder."""

    code = "already-exists"


class AmbiguousError(NotFoundError):
    """An abbreviated id fits several; the message lists them."""

    code = "ambiguous"


class InvalidStateError(SandboxError):
    """The subject is in a state in which the verb makes no sense."""

    code = "invalid-state"

    def __init__(self, subject: str, *, state: str, wanted: str, remedy: str = "", detail: str = "") -> None:
        way_out = f": {remedy}" if remedy else ""
        super().__init__(f"cannot {wanted} {subject}: it is {state}{way_out}", detail=detail)
        self.subject = subject
        self.state = state
        self.wanted = wanted


class InvalidArgumentError(SandboxError):
    """What the user gave (option, spec, archive, configuration) is not acceptable."""

    code = "invalid-argument"


class InvalidBundleError(InvalidArgumentError):
    """An OCI bundle or its config.json is malformed."""

    code = "invalid-bundle"


class CommandNotFoundError(SandboxError):
    """The container's program does not exist (exit code 127)."""

    code = "command-not-found"


class CommandNotExecutableError(SandboxError):
    """The container's program exists but cannot be executed (exit code 126)."""

    code = "command-not-executable"


class UnsupportedError(SandboxError):
    """Asked for something this product or this machine cannot do."""

    code = "unsupported"


class ExhaustedError(SandboxError):
    """A bounded resource (slot, space, memory) has run out."""

    code = "exhausted"


class UnavailableError(SandboxError):
    """The virtual machine, its agent or a helper is gone or does not answer."""

    code = "unavailable"


class EndingError(UnavailableError):
    """The pod, or the supervisor that was asked, is on its way out: who asks again when it is gone may succeed."""

    code = "ending"


class UnheardError(EndingError):
    """The supervisor was gone before it had read the request: even what must not be done twice can be asked again."""

    code = "unheard"


class TimedOutError(UnavailableError):
    """Something did not happen within its deadline."""

    code = "timed-out"


def _tree(root: type[SandboxError]) -> list[type[SandboxError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


BY_CODE: dict[str, type[SandboxError]] = {cls.code: cls for cls in _tree(SandboxError)}


def from_code(code: str, message: str, detail: str = "") -> SandboxError:
    """Rebuild an error that another process reported; an unknown code becomes the root class."""
    cls = BY_CODE.get(code, SandboxError)
    error = cls.__new__(cls)
    SandboxError.__init__(error, message, detail=detail)
    return error


def printable(text: str) -> str:
    """The text with everything escaped that does not show as itself: it must not steer the terminal it is shown on."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    return letter if letter.isprintable() else repr(letter)[1:-1]


def one_line(message: object) -> str:
    """A message as a user gets to see it; guests and archives choose some of the names in it."""
    return printable(" ".join(str(message).split()))


def evidence(error: SandboxError) -> str:
    """The detail as a user gets to see it."""
    return "\n".join(map(printable, error.detail.expandtabs().rstrip().splitlines()))


def is_shortage(error: OSError) -> bool:
    """Whether there was no room to look: that says nothing about what was looked for."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def room_for(error: OSError) -> str:
    """What makes room where there was none, to be put behind the message."""
    remedies = {
        errno.EMFILE: ": raise the limit of open files (ulimit -n)",
        errno.ENFILE: ": raise the limit of open files (sysctl fs.file-max)",
        errno.ENOMEM: ": free some memory",
    }
    return remedies.get(error.errno or 0, "")


def refused(error: OSError, *, wanted: str) -> SandboxError:
    """For what the system refused where nobody expected it to; the traceback is the evidence."""
    try:
        import traceback
    except OSError:  # there is no descriptor to read it with
        detail = ""
    else:
        detail = "".join(traceback.format_exception(error))
    what = f"'{error.filename}': " if error.filename else ""
    text = f"cannot {wanted}: {what}{(error.strerror or str(error)).lower()}{room_for(error)}"
    return SandboxError(text, detail=detail)
