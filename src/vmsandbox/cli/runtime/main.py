"""The `vmsandbox-runtime` command: what engines call instead of runc, with runc's options, wording and exit codes.

Thin: one request to the pod's supervisor, and nothing heavy imported.  It works with an empty environment, in any
directory, and with descriptors that a careless caller leaked.
"""

from __future__ import annotations

import os
import sys
import time

from vmsandbox import __version__
from vmsandbox.cli import output
from vmsandbox.cli.runtime.options import HelpAsked, boolean
from vmsandbox.errors import InvalidArgumentError, SandboxError, one_line, refused
from vmsandbox.paths import Roots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

SPEC = "1.2.0"
FAILED = 1
#: what `exec` ends with when it fails itself, as runc does
EXEC_FAILED = 255
#: what runc's library for command lines ends with when it does not know a verb
UNKNOWN_VERB = 3
#: verb -> (module, one line of help)
VERBS = {
    "create": ("creation", "create a container from a bundle"),
    "start": ("lifecycle", "run the program of a created container"),
    "run": ("creation", "create a container and start it"),
    "delete": ("lifecycle", "remove a container that is stopped"),
    "kill": ("lifecycle", "send a signal to a container"),
    "exec": ("execution", "run another process in a container"),
    "state": ("looking", "print the state of a container"),
    "list": ("looking", "list the containers below the root"),
    "ps": ("looking", "list the processes of a container"),
    "events": ("looking", "print what a container uses"),
    "pause": ("limits", "freeze all processes of a container"),
    "resume": ("limits", "let a paused container go on"),
    "update": ("limits", "change the limits of a container"),
    "spec": ("static", "write a config.json to begin with"),
    "features": ("static", "print what is supported"),
    "install": ("install", "make podman, docker or containerd know this runtime"),
    "uninstall": ("install", "undo that"),
    "checkpoint": ("static", ""),
    "restore": ("static", ""),
}


class Options:
    """The global options."""

    __slots__ = ("config", "data_root", "debug", "log", "log_format", "root", "systemd_cgroup")

    def __init__(self) -> None:
        self.root = ""
        self.data_root = ""
        self.config = ""
        self.log = ""
        self.log_format = "text"
        self.debug = False
        self.systemd_cgroup = False

    def roots(self) -> Roots:
        return Roots.chosen(self.root or None, self.data_root or None)

    def supervisor_arguments(self) -> tuple[str, ...]:
        """What a supervisor started for this command has to know of them."""
        config = ("--config", os.path.abspath(self.config)) if self.config else ()
        return (*(("--debug",) if self.debug else ()), *config)


VALUES = {
    "root": "root",
    "data-root": "data_root",
    "config": "config",
    "log": "log",
    "log-format": "log_format",
}
FLAGS = ("debug", "systemd-cgroup", "help", "h", "version", "v")


def parse(argv: list[str]) -> tuple[Options, list[str]]:
    """Take the global options off the front; what is left starts with the verb."""
    options, refused = Options(), ""
    rest = list(argv)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).lstrip("-").partition("=")
        if name in FLAGS:
            on = boolean(name, value if equals else "true")
            if name in ("help", "h") and on:
                return options, ["help"]
            if name in ("version", "v") and on:
                return options, ["version"]
            if name == "debug":
                options.debug = on
            elif name == "systemd-cgroup":
                from vmsandbox import cgroups

                options.systemd_cgroup = on
                if on and not cgroups.systemd_runs():
                    refused = "'--systemd-cgroup' is not supported: no systemd runs here, use 'cgroupfs'"
        elif name in VALUES or name in ("rootless", "criu"):
            if not equals:
                if not rest:
                    raise InvalidArgumentError(f"flag needs an argument: -{name}")
                value = rest.pop(0)
            if name == "rootless":
                if value not in ("auto", "false"):
                    refused = f"'--rootless {value}' is not supported: virtual machines need root"
            elif name != "criu":  # for checkpoints, which are refused
                setattr(options, VALUES[name], value)
        else:
            raise InvalidArgumentError(f"flag provided but not defined: -{name}")
    if options.log_format not in ("text", "json"):
        raise InvalidArgumentError(f"invalid log-format: '{options.log_format}'")
    if refused:
        report(options, refused)
        sys.exit(FAILED)
    return options, rest


def usage() -> str:
    rows = [f"   {verb:<10} {text}" for verb, (_, text) in VERBS.items() if text]
    return "\n".join(
        [
            "usage: vmsandbox-runtime [--root DIR] [--data-root DIR] [--config FILE] [--log FILE]",
            "                         [--log-format text|json] [--debug] VERB ...",
            "",
            "An OCI runtime whose containers run inside virtual machines, one for each pod.",
            "",
            *rows,
        ]
    )


def version() -> str:
    return f"vmsandbox-runtime version {__version__}\ncommit: v{__version__}\nspec: {SPEC}"


def stamp(seconds: float | None = None) -> str:
    """A time as Go writes it."""
    now = time.time() if seconds is None else seconds
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    return f"{whole}.{int(now % 1 * 1e9):09d}Z"


def report(options: Options, message: str, *, level: str = "error") -> None:
    """Say what went wrong where the engine looks: in its log file, if it named one, and on stderr.

    What is no error is on stderr only where there is no log file.
    """
    from vmsandbox import plainjson

    message = one_line(message)
    quoted = plainjson.quoted(message)
    moment = stamp()[:19] + "Z"
    if options.log_format == "json":
        line = f'{{"level":"{level}","msg":{quoted},"time":"{moment}"}}'
    else:
        line = f'time="{moment}" level={level} msg={quoted}'
    if options.log:
        try:
            with open(options.log, "a", encoding="utf-8", errors="replace") as file:
                file.write(line + "\n")
        except OSError as error:
            line = f"cannot write log '{options.log}': {error.strerror}; {message}"
        else:
            line = message
    if level == "error" or not options.log:
        print(line, file=sys.stderr, flush=True)


def warn(options: Options, answer: dict[str, Any]) -> None:
    """Report what a supervisor's answer says beside that it was done."""
    for warning in answer.get("warnings") or ():
        report(options, str(warning), level="warning")


def main() -> int:
    """Entry point of the `vmsandbox-runtime` command."""
    output.occupy_stdio()
    options, verb = Options(), ""
    try:
        options, rest = parse(sys.argv[1:])
        if rest[:1] in (["help"], ["h"]) and len(rest) > 1:
            rest = [rest[1], "--help"]
        if not rest or rest[0] in ("help", "h", "version"):
            print(version() if rest == ["version"] else usage())
            return 0
        verb = rest[0]
        if verb not in VERBS:
            report(options, f"unknown command '{verb}': 'vmsandbox-runtime --help' lists them")
            return UNKNOWN_VERB
        # Not by importlib, whose own import is a tenth of what `state` takes beyond Python's start.
        module = __import__(f"vmsandbox.cli.runtime.{VERBS[verb][0]}", fromlist=[verb])
        handler: Callable[[Options, list[str]], int] = getattr(module, f"{verb}_verb")
        return handler(options, rest[1:])
    except HelpAsked as asked:
        about = VERBS[verb][1] or "not supported"
        print(f"usage: vmsandbox-runtime {verb} [OPTION...] ...\n\n{about}\n\n{asked.text}".rstrip())
        return 0
    except SandboxError as error:
        if error.detail and options.debug:
            report(options, error.detail, level="debug")
        report(options, str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            output.give_up_stdout()
            return FAILED
        report(options, str(refused(error, wanted=verb or "begin")))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # A bug; engines still want one line, and where it is says the debug log.
        import traceback

        if options.debug:
            report(options, traceback.format_exc(), level="debug")
        report(options, f"internal error: {type(error).__name__}: {error}")
    return EXEC_FAILED if verb == "exec" else FAILED
