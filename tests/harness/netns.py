"""Network namespaces for tests: everything that touches a network does so inside of them."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000


class Netns:
    """A namespace made with iproute2; loopback is up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = f"/run/netns/{name}"

    def run(self, *commands: str) -> str:
        """Run shell commands inside, one after the other; the output of the last."""
        output = ""
        for command in commands:
            done = subprocess.run(
                ["ip", "netns", "exec", self.name, "sh", "-c", command], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
            output = done.stdout
        return output

    def processes(self) -> list[int]:
        """Everything that runs inside."""
        here = os.stat(self.path).st_ino
        found = []
        for entry in os.listdir("/proc"):
            with suppress(OSError):  # it has ended, or is no process
                if os.stat(f"/proc/{entry}/ns/net").st_ino == here and entry.isdigit():
                    found.append(int(entry))
        return found

    def within(self, work: Callable[[], T]) -> T:
        """Call `work` in a thread that is in the namespace: sockets it makes belong there."""
        results: list[T] = []
        errors: list[BaseException] = []

        def enter() -> None:
            try:
                fd = os.open(self.path, os.O_RDONLY)
                try:
                    assert ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET) == 0
                finally:
                    os.close(fd)
                results.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def packet_socket(self, interface: str) -> socket.socket:
        """A raw socket at an interface, with a deadline of a few seconds."""

        def make() -> socket.socket:
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            made.bind((interface, 0))
            made.settimeout(5)
            return made

        return self.within(make)

    def settle(self, interface: str) -> None:
        """Return when an interface has its link-local address: then the kernel changes nothing more by itself."""
        deadline = time.monotonic() + 10
        while "fe80:" not in self.run(f"ip -6 addr show dev {interface} scope link -tentative"):
            assert time.monotonic() < deadline, f"{interface} does not settle"

    def state(self) -> list[str]:
        """All that is configured, for comparison before and after; what the kernel still settles is left out."""
        text = self.run(
            "ip -d link; ip addr | grep -v valid_lft; ip route show table all; ip -6 route show table all;"
            "ip rule; ip -6 rule; ip neigh show nud permanent; tc qdisc;"
            "for i in $(ls /sys/class/net); do tc filter show dev $i ingress; done"
        )
        settled = re.sub(r"NO-CARRIER,|,LOWER_UP| state \w+| tentative| linkdown|\w+_timer +[\d.]+", "", text)
        # Of neighbours and routes the kernel keeps no order.
        return sorted(settled.splitlines())


@contextmanager
def namespace(name: str) -> Iterator[Netns]:
    """A namespace for the block; several runs of the tests can have one of a name."""
    name = f"{name}-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        made = Netns(name)
        made.run("ip link set lo up")
        yield made
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))
