"""Networks by the plugins of the Container Network Interface, as its specification 1.0 says.

A plugin is a program that gets its task by environment and stdin and answers on stdout.  A network is a list of them:
each adds to what the one before it did, and in reverse order they take it away.  Taking away is always possible
again, also when the namespace or half of the rest is gone.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import InvalidArgumentError, SandboxError, TimedOutError, UnavailableError, UnsupportedError
from vmsandbox_hypervisor.aio import finish
from vmsandbox_hypervisor.children import spawn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VERSION = "1.0.0"
#: the error code for "try again": somebody else holds a lock
TRY_AGAIN = 11
#: seconds a plugin may take
TIMEOUT = 60.0
_ATTEMPTS = 5
_ANSWER_LIMIT = 1 << 20
_MESSAGE_LIMIT = 1000


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """One pod on one network; all that is needed to take it away again."""

    #: a network configuration list
    network: Mapping[str, Any]
    container_id: str
    netns: str
    interface: str = "eth0"
    #: by capability, e.g. ``{"portMappings": [...]}``
    runtime: Mapping[str, Any]
    plugins: Sequence[str]

    def document(self) -> dict[str, Any]:
        return {
            "network": dict(self.network),
            "container_id": self.container_id,
            "netns": self.netns,
            "interface": self.interface,
            "runtime": dict(self.runtime),
            "plugins": [*self.plugins],
        }

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Attachment:
        return cls(**document)


async def add(attachment: Attachment) -> dict[str, Any]:
    """Put a pod on a network; the last plugin's result.  Undone if one of them fails.

    Raises UnsupportedError where a plugin is missing, UnavailableError with a plugin's own words otherwise.
    """
    for program in programs(attachment.network):
        find(program, attachment.plugins)
    result: dict[str, Any] = {}
    try:
        for plugin in attachment.network["plugins"]:
            result = await _run("ADD", attachment, plugin, result)
    except BaseException:
        await finish(_undo(attachment, result), seconds=2 * TIMEOUT)
        raise
    return result


async def check(attachment: Attachment, result: Mapping[str, Any]) -> None:
    """Raise what a plugin finds wrong with what `add` answered."""
    for plugin in attachment.network["plugins"]:
        await _run("CHECK", attachment, plugin, result)


async def remove(attachment: Attachment, result: Mapping[str, Any]) -> None:
    """Take a pod off a network: every plugin has its turn, the first error is raised afterwards.

    `result` is what `add` answered; without it a plugin may not find everything that it did.
    """
    first: SandboxError | None = None
    for plugin in reversed(attachment.network["plugins"]):
        try:
            await _run("DEL", attachment, plugin, result)
        except SandboxError as error:
            first = first or error
    if first is not None:
        raise first


async def _undo(attachment: Attachment, result: Mapping[str, Any]) -> None:
    try:
        await remove(attachment, result)
    except SandboxError:
        return  # the error that matters is the one that made this necessary


def programs(network: Mapping[str, Any]) -> list[str]:
    """The names of all programs that a network needs: its plugins, and those that they call for addresses."""
    named = [(plugin, plugin.get("ipam") or {}) for plugin in network["plugins"]]
    return [str(each.get("type")) for pair in named for each in pair if each]


def located(name: str, directories: Sequence[str]) -> Path | None:
    """Where the program of a plugin is, if it is anywhere."""
    for directory in directories:
        path = Path(directory, name)
        try:
            mode = path.stat().st_mode
        except OSError:
            continue
        if stat.S_ISREG(mode) and mode & 0o111:
            return path
    return None


def find(name: str, directories: Sequence[str]) -> Path:
    """The program of a plugin; raises UnsupportedError."""
    if not name or "/" in name:
        raise InvalidArgumentError(f"'{name}' is not a name of a network plugin")
    if (path := located(name, directories)) is not None:
        return path
    raise UnsupportedError(
        f"network plugin '{name}' is not in {' or '.join(repr(each) for each in directories)}: "
        "install 'containernetworking-plugins', or run with '--network none'"
    )


async def _run(
    command: str, attachment: Attachment, plugin: Mapping[str, Any], previous: Mapping[str, Any]
) -> dict[str, Any]:
    name = str(plugin.get("type"))
    program = find(name, attachment.plugins)
    configuration = {
        **plugin,
        "cniVersion": attachment.network["cniVersion"],
        "name": attachment.network["name"],
    }
    capabilities = configuration.pop("capabilities", {})
    runtime = {key: value for key, value in attachment.runtime.items() if capabilities.get(key)}
    if runtime:
        configuration["runtimeConfig"] = runtime
    if previous:
        configuration["prevResult"] = dict(previous)
    environment = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": attachment.container_id,
        "CNI_NETNS": attachment.netns if command != "DEL" or os.path.exists(attachment.netns) else "",
        "CNI_IFNAME": attachment.interface,
        "CNI_PATH": ":".join(attachment.plugins),
    }
    for attempt in range(1, _ATTEMPTS + 1):
        status, output = await _call(program, environment, json.dumps(configuration).encode())
        answer = _parsed(output)
        if status == 0:
            return answer
        if answer.get("code") == TRY_AGAIN and attempt < _ATTEMPTS:
            await asyncio.sleep(0.1 * attempt)
            continue
        raise UnavailableError(f"network plugin '{name}' failed: {_reason(answer, output)}")
    raise AssertionError


async def _call(program: Path, environment: Mapping[str, str], given: bytes) -> tuple[int | None, bytes]:
    """Run a plugin with nothing but its own environment; exit status and what it printed."""
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    argv = ["env", "-i", path, *(f"{key}={value}" for key, value in environment.items()), str(program)]
    standard_input = os.memfd_create("cni-in", os.MFD_CLOEXEC)
    output = os.memfd_create("cni-out", os.MFD_CLOEXEC)
    try:
        os.pwrite(standard_input, given, 0)
        child = spawn(f"plugin {program.name}", argv, fds={0: standard_input}, stderr=output)
        try:
            async with asyncio.timeout(TIMEOUT):
                status = await child.wait()
        except TimeoutError:
            raise TimedOutError(f"network plugin '{program.name}' took longer than {TIMEOUT:g} s") from None
        finally:
            if child.alive:
                await finish(child.stop())
        return status, os.pread(output, _ANSWER_LIMIT, 0)
    finally:
        os.close(standard_input)
        os.close(output)


def _parsed(output: bytes) -> dict[str, Any]:
    """The JSON object in what a plugin printed; a warning in front of it is passed over."""
    text = output.decode(errors="replace")
    start = text.find("{")
    try:
        answer = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _reason(answer: Mapping[str, Any], output: bytes) -> str:
    said = str(answer.get("msg") or "") + (f" ({answer['details']})" if answer.get("details") else "")
    text = said or output.decode(errors="replace")
    return " ".join(text.split())[:_MESSAGE_LIMIT] or "it said nothing"
