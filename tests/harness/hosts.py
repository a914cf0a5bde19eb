"""A namespace that plays the host, with a cable to one that plays the rest of the world.

What changes the host's network, its own or a container's, happens in here: the machine that runs the tests keeps its
network.  The processes are the machine's own, so that tests see them.
"""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.harness.netns import Netns, namespace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: the host's own address, and the world's, on the cable between them
ADDRESS, WORLD = "192.0.2.2", "192.0.2.1"
ADDRESS6, WORLD6 = "2001:db8::2", "2001:db8::1"
#: ranges that the host reaches by a route and by an interface: a network of ours must have another
TAKEN = ("10.90.0.0/16", "10.91.7.0/24")
#: chains of the plugins that are not a container's
LASTING = ("CNI-ADMIN", "CNI-FORWARD", "CNI-HOSTPORT-DNAT", "CNI-HOSTPORT-MASQ", "CNI-HOSTPORT-SETMARK")
RESOLV_CONF = "nameserver 127.0.0.53\nsearch lan.example\noptions ndots:2\n"


class Host(Netns):
    """The host's namespace; `prefix` in front of a command runs it there, with mounts that only such commands see."""

    def __init__(self, space: Netns, world: Netns, keeper: int) -> None:
        super().__init__(space.name)
        self.world = world
        self.prefix = ("nsenter", "-t", str(keeper), "--mount", "--net")

    def call(self, *words: str) -> str:
        """Run a program with the host's mounts."""
        done = subprocess.run([*self.prefix, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def rules(self) -> list[str]:
        """The firewall; chains of the plugins' own stay when they are empty, and so does what leads to them."""
        found = self.call("sh", "-c", "iptables-save; ip6tables-save").splitlines()
        rules = [line for line in found if line.startswith("-") or "CNI-DN-" in line or "CNI-SN-" in line]
        return [line for line in rules if not any(chain in line for chain in LASTING)]


@contextmanager
def host(scratch: Path, *, name: str = "vmstest") -> Iterator[Host]:
    """A host and its world for the block; `name` tells its namespaces from those of other tests."""
    (scratch / "resolv.conf").write_text(RESOLV_CONF)
    with namespace(f"{name}-host") as space, namespace(f"{name}-world") as world:
        space.run(
            # The plugins turn it on where a network needs it, and it stays.
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1",
            f"ip link add up0 type veth peer name down0 netns {world.name}",
            f"ip addr add {ADDRESS}/24 dev up0; ip -6 addr add {ADDRESS6}/64 dev up0 nodad",
            "ip link set up0 up",
            "ip link add lan0 type bridge; sysctl -qw net.ipv6.conf.lan0.disable_ipv6=1",
            "ip addr add 10.91.7.1/24 dev lan0; ip link set lan0 up",
        )
        world.run(
            f"ip addr add {WORLD}/24 dev down0; ip -6 addr add {WORLD6}/64 dev down0 nodad",
            "ip link set down0 up",
        )
        space.run(
            f"ip route add default via {WORLD}; ip -6 route add default via {WORLD6}",
            f"ip route add {TAKEN[0]} via {WORLD}",
        )
        space.settle("up0")
        mounts = f"mount --bind {scratch / 'resolv.conf'} /etc/resolv.conf"
        apart = ("nsenter", f"--net={space.path}", "unshare", "--mount", "--propagation", "private")
        keeper = subprocess.Popen(
            [*apart, "sh", "-ec", f"{mounts}; echo ready; exec sleep infinity"], stdout=subprocess.PIPE
        )
        try:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == b"ready\n"
            yield Host(space, world, keeper.pid)
        finally:
            keeper.kill()
            keeper.communicate()
