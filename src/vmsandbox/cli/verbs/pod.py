"""`vmsandbox pod create|ls|inspect|start|stop|rm`: virtual machines that several containers share."""

from __future__ import annotations

import json
import os
import sys

from vmsandbox import documents, records, remains
from vmsandbox.arguments import Parser
from vmsandbox.cli import client, launch, table
from vmsandbox.cli.verbs._each import each
from vmsandbox.cli.verbs.ps import ago
from vmsandbox.cli.verbs.run import add_pod_options, clear_up, network_options, new_id
from vmsandbox.cli.verbs.stop import seconds
from vmsandbox.errors import InvalidStateError, NotFoundError, SandboxError, one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from vmsandbox.cli.main import Options
    from vmsandbox.paths import Roots


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="vmsandbox pod",
        description="Pods are virtual machines that several containers share, with their network, IPC and hostname.",
    )
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    creating = verbs.add_parser("create", help="start a virtual machine without a container yet", allow_abbrev=False)
    add = creating.add_argument
    add("--name", default="", help="a name for the pod, also its hostname")
    add("--hostname", default="", metavar="NAME")
    add("--share", default=None, metavar="LIST", help="of 'ipc,uts,pid' (default ipc,uts), or 'none'")
    add("--shm-size", default=None, metavar="SIZE", help="size of the shared /dev/shm")
    add("--sysctl", action="append", default=[], metavar="KEY=VALUE", help="of the network")
    add_pod_options(creating)
    listing = verbs.add_parser("ls", help="list pods")
    listing.add_argument("-q", "--quiet", action="store_true", help="ids only")
    listing.add_argument("--no-trunc", action="store_true", help="whole ids")
    listing.add_argument("--format", choices=("table", "json"), default="table")
    inspecting = verbs.add_parser("inspect", help="show everything known about pods")
    starting = verbs.add_parser("start", help="start stopped pods with all their containers")
    stopping = verbs.add_parser("stop", help="stop the containers of pods, then the virtual machines")
    help_of_time = "before SIGKILL; -1: never"
    stopping.add_argument("-t", "--time", type=seconds, default=None, metavar="SECONDS", help=help_of_time)
    removing = verbs.add_parser("rm", help="remove pods with their containers")
    removing.add_argument("-f", "--force", action="store_true", help="with running containers as well: they are killed")
    for each_verb in (inspecting, starting, stopping, removing):
        each_verb.add_argument("pods", nargs="+", metavar="POD")
    return made


def main(options: Options, argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    roots = options.roots()
    if arguments.verb == "create":
        return create(options, roots, arguments)
    if arguments.verb == "ls":
        return show(roots, arguments)
    if arguments.verb == "inspect":
        found = [describe(roots, records.load_pod(roots, records.resolve_pod(roots, name))) for name in arguments.pods]
        print(json.dumps(found, indent=2))
        return 0
    acts = {"start": start, "stop": stop, "rm": remove}

    def act(name: str) -> None:
        client.insisting(lambda: acts[arguments.verb](options, roots, name, arguments))

    return each(arguments.pods, act, debug=options.debug)


# ---------------------------------------------------------------- create


def create(options: Options, roots: Roots, arguments: argparse.Namespace) -> int:
    """Reserve the name, then bring the virtual machine up; prints the id."""
    pod_id = new_id()
    shared = arguments.share
    request = {
        "verb": "pod-create",
        "sandbox": {
            "id": pod_id,
            "name": arguments.name,
            "hostname": arguments.hostname,
            "share": None if shared is None else [each for each in shared.split(",") if each not in ("", "none")],
            "shm_size": arguments.shm_size,
            "sysctls": arguments.sysctl,
            "shared_fs": arguments.shared_fs,
            "accel": arguments.accel,
            "template": arguments.template,
            "network": network_options(arguments),
        },
    }
    if arguments.name:
        records.reserve_name(roots, arguments.name, pod_id)
    try:
        sandbox = launch.make_run_directory(roots, pod_id)
        try:
            with launch.locked(sandbox), launch.listen(sandbox) as listener:
                launch.spawn_supervisor(
                    roots, sandbox, listener, arguments=options.supervisor_arguments(), nursed=True, founding=True
                )
        except BaseException:
            remains.remove_tree(sandbox.dir)
            raise
        with launch.connect(sandbox) as sock:
            try:
                client.request(sock, request)
            except SandboxError:
                client.wait_for_end(sock)
                clear_up(options, roots, pod_id)
                raise
    except BaseException:
        if arguments.name and not os.path.lexists(f"{roots.by_pod_dir}/{pod_id}"):
            records.release_name(roots, arguments.name, pod_id)
        raise
    print(pod_id)
    return 0


# ---------------------------------------------------------------- looking


def show(roots: Roots, arguments: argparse.Namespace) -> int:
    """List pods, newest first; a damaged one is named on stderr and spoils no other."""
    rows = []
    for pod in records.pods(roots):
        if isinstance(pod, SandboxError):
            print(f"vmsandbox: {one_line(pod)}", file=sys.stderr)
            continue
        rows.append(row(roots, pod))
    rows.sort(key=lambda row: -row["created"])
    if arguments.quiet:
        for entry in rows:
            print(entry["id"] if arguments.no_trunc else entry["id"][: records.SHOWN_ID])
    elif arguments.format == "json":
        print(json.dumps(rows, indent=2))
    else:
        lines = [("POD ID", "NAME", "STATUS", "CREATED", "CONTAINERS")]
        for entry in rows:
            lines.append(
                (
                    entry["id"] if arguments.no_trunc else entry["id"][: records.SHOWN_ID],
                    entry["name"],
                    entry["status"].capitalize(),
                    f"{ago(entry['created'])} ago" if entry["created"] else "",
                    f"{entry['running']} running of {len(entry['containers'])}",
                )
            )
        print(table.aligned(lines))
    return 0


def row(roots: Roots, pod: records.Pod) -> dict[str, Any]:
    found = containers(roots, pod)
    return {
        "id": pod.id,
        "name": pod.name,
        "status": pod.status(),
        "created": pod.document.get("created") or 0,
        "containers": [container["id"] for container in found],
        "running": sum(container["status"] in ("running", "paused") for container in found),
    }


def containers(roots: Roots, pod: records.Pod) -> list[dict[str, Any]]:
    """What is worth saying of each container; of a damaged one, why."""
    found: list[dict[str, Any]] = []
    for container in pod.containers(roots):
        if isinstance(container, SandboxError):
            found.append({"id": "", "name": "", "status": "unknown", "error": str(container)})
        else:
            found.append({"id": container.id, "name": container.name, "status": container.status()})
    return found


def describe(roots: Roots, pod: records.Pod) -> dict[str, Any]:
    """The pod's document with its status judged now, and its containers."""
    document = dict(pod.document)
    document.pop("version", None)
    if document.get("supervisor") and pod.status() == "stopped":
        document.pop("supervisor")
    return {
        **document,
        "status": pod.status(),
        "containers": containers(roots, pod),
        "run_directory": pod.sandbox.dir,
    }


# ---------------------------------------------------------------- start, stop, rm


def start(options: Options, roots: Roots, name: str, _arguments: argparse.Namespace) -> None:
    """Bring the machine up and start every container that does not run."""
    from vmsandbox.cli.verbs import start as containers_start

    pod = records.load_pod(roots, records.resolve_pod(roots, name))
    try:
        connection = launch.connect_or_take_over(
            roots, pod.sandbox, revive=True, arguments=options.supervisor_arguments()
        )
    except FileNotFoundError:
        raise NotFoundError(f"no such pod: '{name}'; 'vmsandbox pod ls' lists them") from None
    with connection as sock:
        try:
            client.request(sock, {"verb": "pod-start"})
        except SandboxError:
            client.wait_for_end(sock)
            raise
    failed = []
    for container in pod.containers(roots):
        if isinstance(container, SandboxError):
            failed.append(container)
        elif container.status() in ("stopped", "created"):
            try:
                containers_start.start(options, roots, container.id)
            except InvalidStateError:
                continue  # somebody else starts it, or removes it, just now
            except SandboxError as error:
                failed.append(error)
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise SandboxError(f"pod '{name}' runs, but not with all its containers: {failed[0]}{more}")


def stop(_options: Options, roots: Roots, name: str, arguments: argparse.Namespace) -> None:
    """Stop containers and machine; a stopped pod is fine."""
    pod = records.load_pod(roots, records.resolve_pod(roots, name))
    if not is_there(pod):
        return
    try:
        connection = launch.connect_or_take_over(roots, pod.sandbox)
    except FileNotFoundError:
        return
    with connection as sock:
        client.request(sock, {"verb": "pod-stop", "timeout": arguments.time})
        client.wait_for_end(sock)


def is_there(pod: records.Pod) -> bool:
    """Whether anything of the pod's machine may be left that a supervisor has to end."""
    return bool(pod.document.get("vm")) or os.path.exists(pod.sandbox.control_file)


def remove(_options: Options, roots: Roots, name: str, arguments: argparse.Namespace) -> None:
    """End the pod and forget it with its containers; without `--force` only if none of them runs."""
    pod = records.load_pod(roots, records.resolve_pod(roots, name))
    alive = [
        container.document
        for container in pod.containers(roots)
        if not isinstance(container, SandboxError) and container.status() not in ("stopped", "creating")
    ]
    if alive and not arguments.force:
        raise records.pod_in_use(name, alive)
    if is_there(pod):
        try:
            with launch.connect_or_take_over(roots, pod.sandbox) as sock:
                client.request(sock, {"verb": "pod-remove", "force": arguments.force})
                client.wait_for_end(sock)
            return
        except FileNotFoundError:
            pass
    remove_from_disk(roots, pod)


def remove_from_disk(roots: Roots, pod: records.Pod) -> None:
    """Forget a pod whose machine has ended, and its containers."""
    if not os.path.isdir(pod.sandbox.dir):
        remains.forget_pod(roots, pod.sandbox)
        return
    with launch.locked(pod.sandbox):
        if remains.is_served(pod.sandbox):
            raise InvalidStateError(
                f"pod '{pod.name or pod.id}'", state="being started", wanted="remove", remedy="try again"
            )
        for name in sorted(os.listdir(pod.sandbox.containers_dir)):
            if not name.endswith(".json"):
                continue
            container_id = name.removesuffix(".json")
            try:
                document = documents.read(f"{pod.sandbox.containers_dir}/{name}")
            except SandboxError:
                document = {}  # damaged: what is known by its id goes all the same
            remains.forget_container(
                roots,
                container_id,
                name=str(document.get("name") or ""),
                image_id=str((document.get("image") or {}).get("id") or ""),
            )
        remains.forget_pod(roots, pod.sandbox)
