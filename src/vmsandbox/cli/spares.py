"""The client's side of machines that are kept ready: taking one, and having one made.  Stdlib only."""

from __future__ import annotations

import os
import sys

from vmsandbox import documents, remains, surroundings
from vmsandbox.cli import launch
from vmsandbox.errors import SandboxError
from vmsandbox.paths import Roots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmsandbox.plainsocket import UnixSocket


def taken(roots: Roots, arguments: Sequence[str]) -> tuple[str, UnixSocket] | None:
    """The id of a pod whose machine is ready, now ours alone, and a connection to its supervisor; None without one.

    `arguments` are those that a supervisor of ours would be started with.
    """
    try:
        names = os.listdir(roots.spares_dir)
    except FileNotFoundError:
        return None
    own = _own_facts(roots, arguments) if names else {}
    for name in names:
        path = f"{roots.spares_dir}/{name}"
        try:
            if "." in name or not _suits(documents.read(path), own):
                continue
            os.unlink(path)
            return name, launch.connect(roots.sandbox(name))
        except (SandboxError, OSError):  # another was faster, or it has ended
            continue
    return None


def _suits(facts: dict[str, object], own: dict[str, object]) -> bool:
    """Whether a supervisor of ours would be as this one is."""
    files = facts.get("files")
    return (
        all(facts.get(name) == fact for name, fact in own.items())
        and isinstance(files, dict)
        and all(surroundings.change_of(path) == change for path, change in files.items())
    )


def _own_facts(roots: Roots, arguments: Sequence[str]) -> dict[str, object]:
    """What makes a supervisor that we start different from others."""
    return {
        "data_root": roots.data_dir,
        "arguments": [*arguments],
        "environment": surroundings.influential(launch.environment()),
        "surroundings": surroundings.of(os.getpid()),
    }


def prepare() -> None:
    """Entry point: ``RUN_ROOT DATA_ROOT ARGUMENT...``: start a supervisor that keeps a machine ready."""
    run_root, data_root, *arguments = sys.argv[1:]
    roots = Roots(run_root, data_root)
    pod_id = os.urandom(32).hex()
    sandbox = launch.make_run_directory(roots, pod_id)
    coming = f"{roots.spares_dir}/{pod_id}.new"
    try:
        os.makedirs(roots.spares_dir, mode=0o700, exist_ok=True)
        documents.write(coming, _own_facts(roots, arguments))
        with launch.locked(sandbox), launch.listen(sandbox) as listener:
            launch.spawn_supervisor(roots, sandbox, listener, arguments=("--spare", pod_id, *arguments), nursed=True)
    except BaseException:
        try:
            os.unlink(coming)
        except FileNotFoundError:
            pass
        remains.remove_tree(sandbox.dir)
        raise
