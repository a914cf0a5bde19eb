"""The host's documents of containers and processes, and what only the guest can fill in.

They are taken as they are but for the ids of a user named in the image, the home directory, the container's control
group, and whether there is a terminal.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vmsandbox_agent import storage, users
from vmsandbox_agent.errors import InvalidArgumentError
from vmsandbox_agent.syscalls import open_in_root

if TYPE_CHECKING:
    from vmsandbox_protocol import agent_pb2 as pb


def parsed(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object; raises InvalidArgumentError for anything else."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidArgumentError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{what} is not a JSON object")
    return value


def complete(spec: dict[str, Any], request: pb.CreateContainerRequest, *, root: int, group: str) -> None:
    """Fill in a config.json; `root` is the container's root directory, `group` its control group."""
    process = spec.setdefault("process", {})
    _complete_process(process, request.user, root=root, default_home=request.default_home, stdio=request.stdio)
    if request.make_cwd:
        _make_directory(root, str(process.get("cwd") or "/"))
    linux = spec.setdefault("linux", {})
    linux["cgroupsPath"] = group
    # crun's own may be that its addresses do not vary; a container's programs get what every process has.
    linux["personality"] = linux.get("personality") or {"domain": "LINUX"}
    if any(each.get("type") == "user" for each in linux.get("namespaces") or []):
        storage.mount_on_demand([str(each.get("source") or "") for each in spec.get("mounts") or []])


def of_exec(request: pb.ExecRequest, spec: dict[str, Any], *, root: int) -> dict[str, Any]:
    """The document of another process in the container with this config.json and root directory."""
    document = asked = parsed(request.process_json, "process")
    if request.inherit:
        document = {**(spec.get("process") or {}), **asked}
        if request.user and "user" not in asked:
            document["user"] = {}
    document.setdefault("cwd", "/")
    _complete_process(document, request.user, root=root, default_home=request.default_home, stdio=request.stdio)
    return document


def _complete_process(document: dict[str, Any], user: str, *, root: int, default_home: bool, stdio: pb.Stdio) -> None:
    if user:
        found = users.resolve(root, user)
        inherited = document.get("user") or {}
        groups = [*found.groups, *(inherited.get("additionalGids") or [])]
        document["user"] = {
            **{key: value for key, value in inherited.items() if key == "umask"},
            "uid": found.uid,
            "gid": found.gid,
            "additionalGids": [*dict.fromkeys(groups)],
        }
    environment = [str(entry) for entry in document.get("env") or []]
    if default_home and not any(entry.startswith("HOME=") for entry in environment):
        uid = int((document.get("user") or {}).get("uid") or 0)
        environment.append(f"HOME={users.home_of(root, uid)}")
    document["env"] = environment
    document["terminal"] = stdio.terminal
    if stdio.terminal and stdio.columns:
        document["consoleSize"] = {"width": stdio.columns, "height": stdio.rows}


def _make_directory(root: int, path: str) -> None:
    """Make a directory and its parents below the root directory `root`, never outside of it."""
    so_far = ""
    for part in [part for part in path.split("/") if part not in ("", ".")]:
        parent = open_in_root(root, so_far or "/", os.O_PATH | os.O_DIRECTORY)
        try:
            so_far = f"{so_far}/{part}"
            with suppress(FileExistsError):
                if part != "..":
                    os.mkdir(part, 0o755, dir_fd=parent)
        except OSError as error:
            raise InvalidArgumentError(f"working directory '{path}' cannot be made: {error.strerror}") from error
        finally:
            os.close(parent)
