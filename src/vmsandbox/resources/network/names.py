"""Names: /etc/hosts and /etc/resolv.conf of pods, and how pods of one network learn of each other.

There is no daemon and no name server.  Each pod puts a file into its network's directory that says what it is called
and where it is; every supervisor watches that directory and rewrites the hosts file of its own guest when it changes.
"""

from __future__ import annotations

import asyncio
import ctypes
import ipaddress
import json
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence
    from pathlib import Path

#: where a resolver on the host that only listens on the loopback notes whom it asks itself
_UPSTREAM = ("/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf")
_MOST_NAMES = 10_000
_FILE_LIMIT = 16 * 1024
_IN_CREATE, _IN_MOVED, _IN_DELETE = 0x100, 0xC0, 0x200
_IN_NONBLOCK, _IN_CLOEXEC = 0x800, 0x80000

LOOPBACK = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


class Resolver:
    """What a resolv.conf says."""

    def __init__(self, servers: Sequence[str], searches: Sequence[str], options: Sequence[str]) -> None:
        self.servers = tuple(servers)
        self.searches = tuple(searches)
        self.options = tuple(options)


def host_resolver(*, etc: str = "/etc/resolv.conf", upstream: Sequence[str] = _UPSTREAM) -> Resolver:
    """The host's, with servers that can be reached from elsewhere only.

    A pod cannot reach what listens on the host's loopback: such a resolver's own servers are taken instead where it
    notes them.  There may be none left.
    """
    found = read_resolver(etc)
    reachable = [server for server in found.servers if is_reachable(server)]
    for path in upstream if not reachable else ():
        reachable = [server for server in read_resolver(path).servers if is_reachable(server)]
        if reachable:
            break
    return Resolver(reachable, found.searches, found.options)


def read_resolver(path: str) -> Resolver:
    """A resolv.conf; an empty one if there is none."""
    servers: list[str] = []
    searches: list[str] = []
    options: list[str] = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(1 << 16).splitlines()
    except OSError:
        lines = []
    for line in lines:
        words = line.split("#", 1)[0].split(";", 1)[0].split()
        if len(words) < 2:
            continue
        if words[0] == "nameserver":
            servers.append(words[1])
        elif words[0] in ("search", "domain"):
            searches = words[1:]
        elif words[0] == "options":
            options += words[1:]
    return Resolver(servers, searches, options)


def is_reachable(server: str) -> bool:
    """Whether a name server's address means the same to a pod as to the host."""
    try:
        address = ipaddress.ip_address(server.partition("%")[0])
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_link_local)


def loopback_servers(path: str) -> list[str]:
    """The name servers of a resolv.conf that only its own network namespace reaches; of IPv4, as engines have them."""
    found = []
    for server in read_resolver(path).servers:
        try:
            address = ipaddress.IPv4Address(server)
        except ValueError:
            continue
        if address.is_loopback:
            found.append(server)
    return found


def hosts_file(own: Iterable[tuple[str, str]], others: Iterable[tuple[str, str]] = ()) -> bytes:
    """An /etc/hosts: addresses with names (several, separated by blanks); earlier ones win."""
    lines = [f"{address}\t{names}\n" for address, names in (*own, *others)]
    return (LOOPBACK + "".join(lines)).encode()


# ---------------------------------------------------------------- the pods of a network


def announce(directory: Path, pod: str, entries: Sequence[tuple[str, str]]) -> None:
    """Say what a pod is called: (address, names)."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = directory / f".{pod}"
    temporary.write_text(json.dumps([list(entry) for entry in entries]))
    temporary.rename(directory / pod)


def withdraw(directory: Path, pod: str) -> None:
    """The pod is gone; safe to repeat."""
    (directory / pod).unlink(missing_ok=True)


def others(directory: Path, pod: str) -> list[tuple[str, str]]:
    """What all pods but one are called, in the order of their ids."""
    found: list[tuple[str, str]] = []
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    for name in names[:_MOST_NAMES]:
        if name == pod or name.startswith("."):
            continue
        try:
            with open(directory / name, encoding="utf-8") as file:
                entries = json.loads(file.read(_FILE_LIMIT))
            found += [(str(address), str(text)) for address, text in entries]
        except (OSError, ValueError, TypeError):
            continue  # just removed, or no file of ours
    return found


async def changes(directory: Path) -> AsyncIterator[None]:
    """Once at once, then after every change of a directory's files; many at a time count as one."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    loop = asyncio.get_running_loop()
    fd = _watching(directory)
    changed = asyncio.Event()
    try:
        loop.add_reader(fd, _drain, fd, changed)
        yield
        while True:
            await changed.wait()
            changed.clear()
            yield
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _watching(directory: Path) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "inotify")
    if libc.inotify_add_watch(fd, os.fsencode(directory), _IN_CREATE | _IN_MOVED | _IN_DELETE) < 0:
        code = ctypes.get_errno()
        os.close(fd)
        raise OSError(code, os.strerror(code), str(directory))
    return int(fd)


def _drain(fd: int, changed: asyncio.Event) -> None:
    try:
        data = os.read(fd, 1 << 16)
    except BlockingIOError:
        return
    at = 0
    while at + 16 <= len(data):
        _, _, _, length = struct.unpack_from("iIII", data, at)
        if not data[at + 16 : at + 16 + length].startswith(b"."):
            changed.set()
        at += 16 + length
