"""`vmsandbox run`: a new container, in a virtual machine of its own or in that of a pod."""

from __future__ import annotations

import argparse
import os

from vmsandbox import records, remains
from vmsandbox.arguments import Parser
from vmsandbox.cli import client, foreground, launch, spares, standin, terminal
from vmsandbox.errors import InvalidArgumentError, NotFoundError, SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmsandbox.cli.main import Options
    from vmsandbox.paths import Roots, SandboxPaths
    from vmsandbox.plainsocket import UnixSocket


def add_pod_options(made: Parser) -> None:
    """What a pod is told, whether it is made on purpose or for a container."""
    add = made.add_argument
    add("--shared-fs", choices=("virtio-fs", "9p", "none"), default=None, help="how files are shared with the host")
    add("--network", default="", metavar="NETWORK", help="none, default, or ns:PATH of a network namespace")
    add("-p", "--publish", action="append", default=[], metavar="[IP:]HOST:CONTAINER[/udp]", help="lead a port here")
    add("--ip", default="", metavar="ADDRESS", help="an address of the default network")
    add("--dns", action="append", default=[], metavar="ADDRESS", help="a name server instead of the host's")
    add("--dns-search", action="append", default=[], metavar="DOMAIN", help="where short names are looked up")
    add("--dns-option", action="append", default=[], metavar="OPTION", help="an option of the resolver")
    add("--add-host", action="append", default=[], metavar="NAME:ADDRESS", help="a line of /etc/hosts")
    add("--accel", choices=("auto", "kvm", "tcg"), default=None, help="acceleration of the virtual machine")
    add("--template", choices=("auto", "require", "off"), default=None, help="start as a clone of a warmed template")


def parser(*, verb: str = "run") -> argparse.ArgumentParser:
    """The options that `run` and `create` share."""
    made = Parser(prog=f"vmsandbox {verb}", allow_abbrev=False)
    add = made.add_argument
    add("-i", "--interactive", action="store_true", help="pass stdin on to the container")
    add("-t", "--tty", action="store_true", help="give the container a terminal")
    if verb == "run":
        add("-d", "--detach", action="store_true", help="print the id and leave the container running")
    else:
        made.set_defaults(detach=True)
    add("--pod", default="", metavar="POD", help="run in the virtual machine of this pod ('vmsandbox pod create')")
    add("--rm", action="store_true", dest="autoremove", help="remove the container when it has ended")
    add("--name", default="", help="a name for the container")
    add("-e", "--env", action="append", default=[], metavar="KEY=VALUE", help="set (or pass on) a variable")
    add("--env-file", action="append", default=[], metavar="FILE", help="read variables from a file")
    add("-w", "--workdir", default="", metavar="DIR", help="working directory in the container")
    add("-u", "--user", default="", metavar="USER[:GROUP]", help="name or uid, group or gid")
    add("--entrypoint", default=None, metavar="COMMAND", help="instead of the image's entrypoint")
    add("--hostname", default="", metavar="NAME")
    add("-l", "--label", action="append", default=[], metavar="KEY=VALUE")
    add("--read-only", action="store_true", help="the container cannot write to its root file system")
    add("--tmpfs", action="append", default=[], metavar="PATH[:OPTIONS]", help="a tmpfs in the container")
    add("-v", "--volume", action="append", default=[], metavar="SRC:DST[:ro]", help="share a host file or directory")
    add("--mount", action="append", default=[], metavar="type=bind|tmpfs,...", help="the same spelled out, or a tmpfs")
    add_pod_options(made)
    add("--device", action="append", default=[], metavar="DISK[:PATH[:rwm]]", help="a block device or raw file")
    add("--cpus", type=float, default=None, metavar="N", help="how much CPU time, and so how many vCPUs; 0: no limit")
    add("-m", "--memory", default=None, metavar="SIZE", help="limit of the container's memory, as 512m")
    add("--pids-limit", type=int, default=None, metavar="N", help="0 or -1: no limit")
    add("--cpu-shares", type=int, default=None, metavar="N")
    add("--cpuset-cpus", default="", metavar="LIST", help="vCPUs of the guest")
    add("--shm-size", default=None, metavar="SIZE", help="size of /dev/shm")
    add("--ulimit", action="append", default=[], metavar="NAME=SOFT[:HARD]")
    add("--sysctl", action="append", default=[], metavar="KEY=VALUE")
    add("--cap-add", action="append", default=[], metavar="CAP")
    add("--cap-drop", action="append", default=[], metavar="CAP")
    add("--privileged", action="store_true", help="all capabilities in the guest; the host stays out of reach")
    add("--stop-signal", default=None, metavar="SIGNAL")
    add("--scratch-size", default=None, metavar="SIZE", help="how much the container may write, as 10g")
    add("--dry-run", action="store_true", help="print what would be run, and do nothing")
    add("image", metavar="IMAGE")
    # argparse would ask for it where the image is missing; without one the image's own is run.
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND ...").required = False
    return made


def container_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as the supervisor takes them: what the user typed, under the names of `oci.options`."""
    given: dict[str, Any] = {
        "args": arguments.command,
        "env": [*environment_files(arguments.env_file), *arguments.env],
        "workdir": arguments.workdir,
        "user": arguments.user,
        "tty": arguments.tty,
        "hostname": arguments.hostname,
        "labels": arguments.label,
        "read_only": arguments.read_only,
        "tmpfs": arguments.tmpfs,
        "volumes": arguments.volume,
        "mounts": arguments.mount,
        "disks": arguments.device,
        "cpus": arguments.cpus,
        "memory": arguments.memory,
        "pids_limit": arguments.pids_limit,
        "cpu_shares": arguments.cpu_shares,
        "cpuset_cpus": arguments.cpuset_cpus,
        "shm_size": arguments.shm_size,
        "ulimits": arguments.ulimit,
        "sysctls": arguments.sysctl,
        "cap_add": arguments.cap_add,
        "cap_drop": arguments.cap_drop,
        "privileged": arguments.privileged,
        "stop_signal": arguments.stop_signal,
    }
    if arguments.entrypoint is not None:
        given["entrypoint"] = [arguments.entrypoint]
    given["client_env"] = client_environment(given["env"])
    return chosen(given)


def chosen(given: dict[str, Any]) -> dict[str, Any]:
    """The options that say something; a zero does."""
    return {key: value for key, value in given.items() if value or (value == 0 and value is not False)}


def network_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the user typed about the network, under the names of `resources.network.options`."""
    names = ("network", "publish", "ip", "dns", "dns_search", "dns_option", "add_host")
    return {name: value for name in names if (value := getattr(arguments, name))}


#: option as typed -> what it is parsed into; they say what a virtual machine is, so with `--pod` they come too late
OF_POD = {
    "--network": "network",
    "-p": "publish",
    "--ip": "ip",
    "--dns": "dns",
    "--dns-search": "dns_search",
    "--dns-option": "dns_option",
    "--add-host": "add_host",
    "--shared-fs": "shared_fs",
    "--accel": "accel",
    "--template": "template",
}


def check_in_pod(arguments: argparse.Namespace) -> None:
    """Refuse what only a pod as a whole can have."""
    for option, name in OF_POD.items():
        if getattr(arguments, name):
            raise InvalidArgumentError(
                f"option '{option}' belongs to the pod, which all its containers share: give it to "
                "'vmsandbox pod create'"
            )


def client_environment(entries: list[str]) -> dict[str, str]:
    """The values of variables that are named without one."""
    return {entry: os.environ[entry] for entry in entries if "=" not in entry and entry in os.environ}


def environment_files(paths: list[str]) -> list[str]:
    """The entries of `--env-file`: a line each, comments and blank lines left out."""
    entries = []
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                lines = file.read().splitlines()
        except OSError as error:
            raise InvalidArgumentError(f"cannot read environment file '{path}': {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InvalidArgumentError(f"environment file '{path}' is not UTF-8: {error.reason}") from error
        entries += [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    return entries


def size_mib(text: str | None) -> int | None:
    """Whole MiB of a size like `10g`."""
    if text is None:
        return None
    units = {"m": 1, "g": 1024, "t": 1024 * 1024}
    digits, unit = text[:-1], text[-1:].lower()
    if unit not in units or not digits.isascii() or not digits.isdigit() or int(digits) == 0:
        raise InvalidArgumentError(f"invalid size '{text}': a number with 'm', 'g' or 't' is wanted, as 10g")
    return int(digits) * units[unit]


def new_id() -> str:
    return os.urandom(32).hex()


def main(options: Options, argv: list[str], *, verb: str = "run") -> int:
    """Run a container; the exit code is its own, or docker's for what went wrong before."""
    arguments = parser(verb=verb).parse_args(argv)
    if arguments.pod:
        check_in_pod(arguments)
    if arguments.dry_run:
        return dry_run(options, arguments)
    if arguments.tty and arguments.interactive and not arguments.detach:
        terminal.require_terminal()
    roots = options.roots()
    pod = records.load_pod(roots, records.resolve_pod(roots, arguments.pod)) if arguments.pod else None
    spare = spares.taken(roots, options.supervisor_arguments()) if pod is None and is_usual(arguments) else None
    container_id = spare[0] if spare else new_id()
    request: dict[str, Any] = {
        "verb": verb,
        "id": container_id,
        "name": arguments.name,
        "image": arguments.image,
        "options": container_options(arguments),
        "cwd": os.getcwd(),
        "autoremove": arguments.autoremove,
        "stdin": arguments.interactive,
        "size": terminal.window_size() if arguments.tty and not arguments.detach else None,
        "scratch_mib": size_mib(arguments.scratch_size),
        "sandbox": {
            "id": container_id,
            "implicit": True,
            "accel": arguments.accel,
            "shared_fs": arguments.shared_fs,
            "template": arguments.template,
            "hostname": arguments.hostname or container_id[: records.SHOWN_ID],
            "network": network_options(arguments),
        },
    }
    if pod is not None:
        request["sandbox"] = {"id": pod.id, "implicit": False}
    if arguments.name:
        records.reserve_name(roots, arguments.name, container_id)
    try:
        if spare is not None:
            return stay(options, roots, roots.sandbox(container_id), spare[1], request, arguments)
        if pod is None:
            return start(options, roots, request, arguments)
        return client.insisting(lambda: join(options, roots, request, arguments))
    except BaseException:
        if arguments.name and not os.path.lexists(f"{roots.by_container_dir}/{container_id}"):
            records.release_name(roots, arguments.name, container_id)
        raise


def is_usual(arguments: argparse.Namespace) -> bool:
    """Whether a machine that was made ready for anybody may do."""
    special = (
        arguments.accel,
        arguments.shared_fs,
        arguments.scratch_size,
        arguments.volume,
        arguments.mount,
        arguments.network,
        arguments.publish,
        arguments.ip,
    )
    return not any(special) and not arguments.read_only and arguments.template != "off"


def start(options: Options, roots: Roots, request: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Start the pod's supervisor and the container's stand-in, and stay with it unless detached."""
    sandbox = launch.make_run_directory(roots, request["sandbox"]["id"])
    try:
        with launch.locked(sandbox), launch.listen(sandbox) as listener:
            launch.spawn_supervisor(
                roots, sandbox, listener, arguments=options.supervisor_arguments(), nursed=True, founding=True
            )
    except BaseException:
        remains.remove_tree(sandbox.dir)
        raise
    return stay(options, roots, sandbox, launch.connect(sandbox), request, arguments)


def join(options: Options, roots: Roots, request: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Start the container in a pod that is there, bringing its machine up again if it was stopped."""
    sandbox = records.load_pod(roots, request["sandbox"]["id"]).sandbox
    try:
        sock = launch.connect_or_take_over(roots, sandbox, revive=True, arguments=options.supervisor_arguments())
    except FileNotFoundError:
        raise NotFoundError(f"no such pod: '{arguments.pod}'; 'vmsandbox pod ls' lists them") from None
    return stay(options, roots, sandbox, sock, request, arguments)


def stay(
    options: Options,
    roots: Roots,
    sandbox: SandboxPaths,
    connection: UnixSocket,
    request: dict[str, Any],
    arguments: argparse.Namespace,
) -> int:
    """Ask for the container and stay with it, unless detached."""
    plan = standin.Plan(
        request["id"],
        stdin=arguments.interactive and not arguments.detach,
        stdout=not arguments.detach,
        terminal=arguments.tty and not arguments.detach,
        client=None if arguments.detach else os.getpid(),
        ends_with_client=arguments.autoremove,
    )
    plan.mode = terminal.current_mode(wanted=plan.terminal and plan.stdin)
    with connection as sock:
        asking = foreground.Asking(sock)
        with foreground.until_answered(asking.give_up):
            pid = standin.of_client(roots, sandbox, plan, detach=arguments.detach)
            request["standin"] = {"pid": pid, "start_time": records.start_time(pid)}
            try:
                asking.request(request)
            except SandboxError:
                standin.end(pid)
                if request["sandbox"]["implicit"]:
                    client.wait_for_end(sock)
                clear_up(options, roots, request["id"])
                if asking.given_up:
                    return 128 + asking.given_up
                raise
        if asking.given_up:
            take_back(roots, request["id"])
            standin.end(pid)
            return 128 + asking.given_up
        if arguments.detach:
            print(request["id"])
            return 0
        with foreground.attending(pid, plan.mode, reads=plan.stdin):
            _, status = os.waitpid(pid, 0)
            client.wait_for_end(sock)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def take_back(roots: Roots, container_id: str) -> None:
    """Remove a container that was given up too late for not being made."""
    from vmsandbox.cli.verbs.rm import remove_by_supervisor

    try:
        client.insisting(lambda: remove_by_supervisor(roots, records.load(roots, container_id), force=True))
    except NotFoundError:
        return  # it has ended, and was to be removed


def clear_up(options: Options, roots: Roots, container_id: str) -> None:
    """Remove what a supervisor that died could not remove any more."""
    if not os.path.lexists(f"{roots.by_container_dir}/{container_id}") and not os.path.exists(
        roots.sandbox(container_id).dir
    ):
        return
    from vmsandbox.cli.main import admin_argv

    argv = admin_argv(options, "gc", ["--quiet"])
    os.waitpid(os.posix_spawn(argv[0], argv, os.environ), 0)


def dry_run(options: Options, arguments: argparse.Namespace) -> int:
    """Hand over to the admin program, which may import what composing a pod needs."""
    import json

    from vmsandbox.cli.main import exec_admin

    request = {
        "id": new_id(),
        "image": arguments.image,
        "options": container_options(arguments),
        "cwd": os.getcwd(),
        "stdin": arguments.interactive,
        "sandbox": {
            "id": "dry-run",
            "pod": arguments.pod,
            "accel": arguments.accel,
            "shared_fs": arguments.shared_fs,
            "network": network_options(arguments),
        },
    }
    return exec_admin(options, "plan", [json.dumps(request)])
