"""`vmsandbox exec`: another process in a running container."""

from __future__ import annotations

import argparse
import os

from vmsandbox import records
from vmsandbox.arguments import Parser
from vmsandbox.cli import client, foreground, launch, standin, terminal
from vmsandbox.cli.verbs._running import stopped_error
from vmsandbox.cli.verbs.run import chosen, client_environment, environment_files
from vmsandbox.errors import EndingError, InvalidStateError, SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from vmsandbox.cli.main import Options


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="vmsandbox exec", allow_abbrev=False)
    add = made.add_argument
    add("-i", "--interactive", action="store_true", help="pass stdin on to the process")
    add("-t", "--tty", action="store_true", help="give the process a terminal")
    add("-d", "--detach", action="store_true", help="do not wait for the process")
    add("-e", "--env", action="append", default=[], metavar="KEY=VALUE", help="set (or pass on) a variable")
    add("--env-file", action="append", default=[], metavar="FILE", help="read variables from a file")
    add("-w", "--workdir", default="", metavar="DIR")
    add("-u", "--user", default="", metavar="USER[:GROUP]")
    add("--privileged", action="store_true", help="all capabilities in the guest")
    add("container", metavar="CONTAINER")
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    return made


def main(options: Options, argv: list[str]) -> int:
    """Run a command in a container; the exit code is the command's."""
    made = parser()
    arguments = made.parse_args(argv)
    if not arguments.command:
        made.error("a command is needed")
    if arguments.tty and arguments.interactive and not arguments.detach:
        terminal.require_terminal()
    roots = options.roots()
    container = records.load(roots, records.resolve(roots, arguments.container))
    if container.status() == "creating":
        raise InvalidStateError(
            f"container '{arguments.container}'", state="being made", wanted="exec in", remedy="try again when it runs"
        )
    if container.status() == "stopped":
        raise stopped_error(arguments.container, wanted="exec in")
    exec_id = os.urandom(16).hex()
    environment = [*environment_files(arguments.env_file), *arguments.env]
    given = {
        "args": arguments.command,
        "env": environment,
        "client_env": client_environment(environment),
        "workdir": arguments.workdir,
        "user": arguments.user,
        "tty": arguments.tty,
        "privileged": arguments.privileged,
    }
    request = {
        "verb": "exec",
        "container": container.id,
        "exec": exec_id,
        "options": chosen(given),
        "tty": arguments.tty,
        "size": terminal.window_size() if arguments.tty and not arguments.detach else None,
        "stdin": arguments.interactive,
    }
    plan = standin.Plan(
        container.id,
        exec_id,
        stdin=arguments.interactive and not arguments.detach,
        stdout=not arguments.detach,
        terminal=arguments.tty and not arguments.detach,
        client=None if arguments.detach else os.getpid(),
        ends_with_client=True,
    )
    plan.mode = terminal.current_mode(wanted=plan.terminal and plan.stdin)
    with launch.connect_or_take_over(roots, container.sandbox) as sock:
        pid = standin.of_client(roots, container.sandbox, plan, detach=arguments.detach)
        request["standin"] = {"pid": pid, "start_time": records.start_time(pid)}

        def give_up(number: int) -> NoReturn:
            standin.end(pid)  # and with it what it stands for
            os._exit(128 + number)

        try:
            with foreground.until_answered(give_up):
                client.request_once(roots, container.sandbox, sock, request)
        except EndingError:
            # Not tried again, since nobody knows how far it came.
            standin.end(pid)
            if records.load(roots, container.id).status() == "stopped":
                raise stopped_error(arguments.container, wanted="exec in") from None
            raise
        except SandboxError:
            standin.end(pid)
            raise
        if arguments.detach:
            return 0
        with foreground.attending(pid, plan.mode, reads=plan.stdin):
            _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
