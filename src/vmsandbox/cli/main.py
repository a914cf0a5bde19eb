"""The `vmsandbox` command: global options, the table of verbs, and nothing heavy.

Verbs that reach a pod are modules below `cli.verbs`, imported only when named; verbs without a pod live in `admin` and
are exec'd, so that what they import never weighs on these.
"""

from __future__ import annotations

import os
import sys

from vmsandbox import __version__
from vmsandbox.cli import output
from vmsandbox.errors import InvalidArgumentError, SandboxError, refused
from vmsandbox.paths import Roots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: verb -> one line of help; the module is `cli.verbs.<verb>`
VERBS = {
    "run": "run a command in a new container in its own virtual machine",
    "create": "make a container that 'start' starts",
    "start": "start containers that were created, or stopped ones again",
    "exec": "run another command in a running container",
    "ps": "list containers",
    "cp": "copy files between a container and the host",
    "logs": "show what a container has printed",
    "stop": "end containers in order",
    "restart": "stop containers and start them again",
    "kill": "send a signal to containers",
    "rm": "remove containers",
    "pause": "freeze the processes of containers",
    "unpause": "let paused containers go on",
    "top": "list the processes of a container",
    "stats": "show what containers use, again every second",
    "update": "change the limits of running containers",
    "inspect": "show everything known about containers",
    "wait": "wait for containers to end and print their exit codes",
    "pod": "make, list, start, stop, remove pods: virtual machines that several containers share",
    "console": "show what the guest kernel of a container or pod printed",
}
ADMIN_VERBS = {
    "image": "import, list, remove container images",
    "guest": "build, list, inspect the guest kernel and image",
    "template": "make, list, remove the warmed machines that pods are cloned from",
    "check": "say what this machine lacks, and which acceleration is used",
    "gc": "remove what no container owns any more",
}


class Options:
    """The global options."""

    __slots__ = ("config", "data_root", "debug", "root")

    def __init__(self) -> None:
        self.root: str | None = None
        self.data_root: str | None = None
        self.config: str | None = None
        self.debug = False

    def roots(self) -> Roots:
        return Roots.chosen(self.root, self.data_root)

    def supervisor_arguments(self) -> tuple[str, ...]:
        """What a supervisor started for this command has to know of them."""
        debug = ("--debug",) if self.debug else ()
        config = ("--config", os.path.abspath(self.config)) if self.config else ()
        return (*debug, *config)


def usage() -> str:
    rows = [f"  {verb:<10} {text}" for verb, text in [*VERBS.items(), *ADMIN_VERBS.items()]]
    return "\n".join(
        [
            "usage: vmsandbox [--root DIR] [--data-root DIR] [--config FILE] [--debug] VERB ...",
            "",
            "Runs containers inside lightweight virtual machines.",
            "",
            *rows,
            "  version    print the version",
            "",
            "'vmsandbox VERB --help' explains a verb.",
        ]
    )


def parse(argv: list[str]) -> tuple[Options, list[str]]:
    """Take the global options off the front; what is left starts with the verb."""
    options = Options()
    names = {"--root": "root", "--data-root": "data_root", "--config": "config"}
    rest = list(argv)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word == "--debug":
            options.debug = True
        elif word in ("-h", "--help"):
            return options, ["help"]
        elif word in ("-v", "--version"):
            return options, ["version"]
        elif name in names:
            if not equals:
                if not rest:
                    raise InvalidArgumentError(f"option '{name}' needs a value")
                value = rest.pop(0)
            setattr(options, names[name], value)
        else:
            raise InvalidArgumentError(f"unknown option '{word}': 'vmsandbox --help' lists them")
    return options, rest


def main() -> int:
    """Entry point of the `vmsandbox` command."""
    output.occupy_stdio()
    options, rest = Options(), [""]
    try:
        options, rest = parse(sys.argv[1:])
        code = dispatch(options, rest)
        sys.stdout.flush()  # what cannot be written is an error of this command, and not of the interpreter's end
        return code
    except SandboxError as error:
        output.report(error, debug=options.debug)
        return output.run_exit_code(error) if rest[0] in ("run", "create", "exec") else output.FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        output.give_up_stdout()
        return output.FAILED
    except OSError as error:
        output.give_up_stdout()
        output.report(refused(error, wanted=rest[0] if rest else "begin"), debug=options.debug)
        return output.ENGINE_FAILED if rest[:1] in (["run"], ["create"], ["exec"]) else output.FAILED


def dispatch(options: Options, rest: list[str]) -> int:
    if not rest or rest[0] == "help":
        print(usage())
        return 0 if rest else output.FAILED
    verb, arguments = rest[0], rest[1:]
    if verb == "version":
        print(f"vmsandbox {__version__}")
        return 0
    if verb in ADMIN_VERBS:
        return exec_admin(options, verb, arguments)
    if verb not in VERBS:
        raise InvalidArgumentError(f"unknown verb '{verb}': 'vmsandbox --help' lists them{nearest(verb)}")
    from importlib import import_module

    handler: Callable[[Options, list[str]], int] = import_module(f"vmsandbox.cli.verbs.{verb}").main
    return handler(options, arguments)


def nearest(verb: str) -> str:
    import difflib

    fits = difflib.get_close_matches(verb, [*VERBS, *ADMIN_VERBS, "version"], n=1)
    return f"; did you mean '{fits[0]}'?" if fits else ""


def admin_argv(options: Options, verb: str, arguments: list[str]) -> list[str]:
    """The command line of the admin program, which may import what a client may not."""
    roots = options.roots()
    argv = [sys.executable, "-m", "vmsandbox.admin", "--root", roots.run_dir, "--data-root", roots.data_dir]
    if options.config:
        argv += ["--config", options.config]
    if options.debug:
        argv.append("--debug")
    return [*argv, verb, *arguments]


def exec_admin(options: Options, verb: str, arguments: list[str]) -> int:
    """Become the admin program."""
    argv = admin_argv(options, verb, arguments)
    sys.stdout.flush()
    os.execv(argv[0], argv)
