"""The networks of `vmsandbox run`, on a host of the tests' own: see `tests.harness.hosts`."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import shutil
import socket
import tempfile
import threading
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import hosts
from tests.harness.boxes import add_program, make_rootfs
from tests.harness.cli import Cli, awaited, kill, title, wait_until_gone
from tests.harness.spares import end_all, offers
from vmsandbox.config.model import Settings
from vmsandbox.resources.network import cni
from vmsandbox.resources.network.bridge import PLUGINS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.hosts import Host
    from tests.harness.netns import Netns

pytestmark = pytest.mark.cloned

#: serves its hostname by HTTP, and by UDP and TCP what it is sent
SERVE = (
    "mkdir /tmp/w; hostname > /tmp/w/index.html; socat UDP-RECVFROM:53,fork EXEC:cat & "
    "socat TCP-LISTEN:7,fork,backlog=256 EXEC:cat,nofork & exec httpd -f -h /tmp/w"
)
#: asks an HTTP server by name or address; busybox is static, and so resolves no names
FETCH = "#!/bin/sh\nprintf 'GET /index.html HTTP/1.0\\r\\n\\r\\n' | socat -t 20 - TCP:$1:${2:-80} | tail -n 1\n"
#: seconds a connection may take
PATIENCE = 20.0


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch, hosts.host(Path(scratch)) as made:
        yield made


@pytest.fixture(scope="module")
def cli(data_root: Path, pod_template: None, host: Host) -> Iterator[Cli]:
    """The command on the host, with a data root of its own, because the default network is part of that."""
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch, tempfile.TemporaryDirectory(prefix="vsd-") as data:
        for name in ("guest", "templates"):
            Path(data, name).symlink_to(data_root / name)
        made = Cli(Path(scratch), Path(data))
        made.owns_data = True
        made.prefix = host.prefix
        made.network = ""
        rootfs = make_rootfs(Path(scratch, "rootfs"))
        add_program(rootfs, Path("/usr/bin/socat"))
        (rootfs / "bin/fetch").write_text(FETCH)
        (rootfs / "bin/fetch").chmod(0o755)
        made.ok("image", "import", f"rootfs:{rootfs}", "--name", "box", "--cmd", "/bin/sh")
        shutil.rmtree(rootfs)
        before = host.state()
        yield made
        made.remove_all()
        made("gc", "-q")
        assert made.leftovers() == []
        assert scratch not in host.call("cat", "/proc/mounts")
        assert host.state() == before
        assert host.rules() == []


@pytest.fixture(scope="module")
def town(cli: Cli) -> tuple[str, str]:
    """A container that serves and one in a pod that was made on purpose, on the default network; their addresses."""
    ports = ("-p", "8080:80", "-p", "127.0.0.1:8081:80", "-p", "5300-5301:53-54/udp")
    cli.ok("run", "-d", "--name", "web", "--hostname", "webhost", *ports, "box", "sh", "-c", SERVE)
    cli.ok("pod", "create", "--name", "peerpod")
    cli.ok("run", "-d", "--name", "peer", "--pod", "peerpod", "box", "sleep", "100000")
    await_server(cli, "web")
    return address_of(cli, "web"), address_of(cli, "peer")


def await_server(cli: Cli, name: str) -> None:
    """Return when a container's server listens."""
    cli.ok("exec", name, "sh", "-c", "until nc 127.0.0.1 80 </dev/null; do sleep 0.1; done 2>/dev/null")


def address_of(cli: Cli, name: str, *, family: str = "inet") -> str:
    shown = cli.ok("exec", name, "ip", "-o", "addr", "show", "dev", "eth0", "scope", "global")
    found = re.search(rf"{family} ([0-9a-f.:]+)/", shown)
    assert found, shown
    return found[1]


def fetched(space: Netns, address: str, port: int) -> str:
    """What an HTTP server says to who asks from a namespace."""

    def ask() -> str:
        with socket.create_connection((address, port), timeout=PATIENCE) as sock:
            sock.sendall(b"GET /index.html HTTP/1.0\r\n\r\n")
            parts = b""
            while part := sock.recv(4096):
                parts += part
        return parts.decode().rpartition("\r\n\r\n")[2].strip()

    return space.within(ask)


def echoed(space: Netns, address: str, port: int, data: bytes) -> bytes:
    """What a UDP server answers to who asks from a namespace; lost datagrams are sent again."""

    def ask() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(PATIENCE / 10)
            sock.connect((address, port))
            for _ in range(10):
                sock.send(data)
                try:
                    return sock.recv(4096)
                except TimeoutError:
                    continue
        return b""

    return space.within(ask)


# ---------------------------------------------------------------- the default network


def test_pods_have_a_network_that_collides_with_nothing(cli: Cli, town: tuple[str, str], host: Host) -> None:
    for address in town:
        assert ipaddress.ip_address(address).is_private
        for taken in hosts.TAKEN:
            assert ipaddress.ip_address(address) not in ipaddress.ip_network(taken)
    assert "default via" in cli.ok("exec", "peer", "ip", "route")
    assert "UP" in cli.ok("exec", "peer", "ip", "link", "show", "lo")


def test_pods_reach_each_other_by_address_and_name(cli: Cli, town: tuple[str, str]) -> None:
    web, peer = town
    identifier = cli.inspect("web")["id"][:12]
    for name in (web, "web", "webhost", identifier):
        assert cli.ok("exec", "peer", "fetch", name) == "webhost\n"
    assert "1 packets received" in cli.ok("exec", "web", "ping", "-c", "1", "-W", "20", peer)
    assert peer in cli.ok("exec", "web", "grep", "-w", "peerpod", "/etc/hosts")


def test_a_machine_that_was_kept_ready_has_its_network_and_a_name_in_it(
    cli: Cli, town: tuple[str, str], tmp_path: Path
) -> None:
    cli.config = tmp_path / "config.toml"
    cli.config.write_text("[sandbox]\nspares = 1\nforks = false\n")
    try:
        cli.ok("run", "--rm", "box", "true")
        (offer,) = awaited(lambda: offers(cli))
        made = cli.ok("run", "-d", "--name", "ready", "--add-host", "else:192.0.2.7", "box", "sleep", "1000").strip()
        assert made == offer
        names = hosts_file(cli, "web")
        assert "1 packets received" in cli.ok("exec", "web", "ping", "-c", "1", "-W", "20", names["ready"])
        own = hosts_file(cli, "ready")
        assert own["else"] == "192.0.2.7"
        assert "1 packets received" in cli.ok("exec", "ready", "ping", "-c", "1", "-W", "20", own["web"])
    finally:
        end_all(cli)
        cli("rm", "-f", "ready")
        cli.config = None


def hosts_file(cli: Cli, name: str) -> dict[str, str]:
    """The addresses that a container knows, by name."""
    lines = cli.ok("exec", name, "cat", "/etc/hosts").splitlines()
    return {word: line.split()[0] for line in lines for word in line.split()[1:]}


def test_published_ports_answer_everywhere(cli: Cli, town: tuple[str, str], host: Host) -> None:
    assert fetched(host, "127.0.0.1", 8080) == "webhost"
    assert fetched(host, "127.0.0.1", 8081) == "webhost"
    assert fetched(host, hosts.ADDRESS, 8080) == "webhost"
    assert fetched(host.world, hosts.ADDRESS, 8080) == "webhost"
    with pytest.raises(OSError, match="refused"):  # published on the loopback only
        fetched(host.world, hosts.ADDRESS, 8081)
    assert echoed(host, "127.0.0.1", 5300, b"here") == b"here"
    assert echoed(host.world, hosts.ADDRESS, 5300, b"there") == b"there"
    for who in ("peer", "web"):  # pods too, and the one that serves itself
        assert cli.ok("exec", who, "fetch", hosts.ADDRESS, "8080") == "webhost\n"


def test_outgoing_traffic_is_the_hosts(cli: Cli, town: tuple[str, str], host: Host) -> None:
    def listen() -> socket.socket:
        return socket.create_server((hosts.WORLD, 7000))

    with host.world.within(listen) as server:
        server.settimeout(PATIENCE)
        with cli.popen("exec", "peer", "nc", "-w", "20", hosts.WORLD, "7000") as client:
            connection, (address, _) = server.accept()
            connection.close()
            client.wait()
    assert address == hosts.ADDRESS


def test_segments_and_checksums_are_left_to_the_hosts_kernel(cli: Cli, town: tuple[str, str]) -> None:
    """The features that guest and QEMU agreed on, by the bits of the virtio specification."""
    bits = cli.ok("exec", "peer", "cat", "/sys/class/net/eth0/device/features").strip()
    wanted = {"CSUM": 0, "GUEST_CSUM": 1, "GUEST_TSO4": 7, "GUEST_TSO6": 8, "HOST_TSO4": 11, "HOST_TSO6": 12}
    assert {name for name, bit in wanted.items() if bits[bit] == "1"} == set(wanted)


def test_a_loopback_resolver_is_no_pods(cli: Cli, town: tuple[str, str]) -> None:
    told = cli.ok("exec", "peer", "cat", "/etc/resolv.conf")
    assert "127." not in told
    assert "nameserver 1.1.1.1" in told  # the host of the tests notes nobody whom its resolver asks
    assert "search lan.example" in told
    assert "options ndots:2" in told


def test_a_pod_is_told_what_its_options_say(cli: Cli, town: tuple[str, str]) -> None:
    web, _ = town
    wanted = str(ipaddress.ip_address(web) + 40)
    options = ("--dns", "192.0.2.53", "--dns-search", "example.org", "--dns-option", "timeout:1", "--ip", wanted)
    names = ("--add-host", "db:10.1.2.3", "--add-host", "gate:host-gateway", "--hostname", "told")
    script = "cat /etc/resolv.conf /etc/hosts /etc/hostname; ip -o addr show eth0; ip route"
    said = cli.ok("run", "--rm", *options, *names, "box", "sh", "-c", script)
    for line in ("nameserver 192.0.2.53", "search example.org", "options timeout:1"):
        assert line in said, said
    assert "1.1.1.1" not in said
    gateway = re.search(r"default via (\S+)", said)
    assert gateway
    for line in ("10.1.2.3\tdb", f"{gateway[1]}\tgate", f"{wanted}\ttold"):
        assert line in said, said
    assert f"{web}\twebhost web" in said
    assert f"inet {wanted}/" in said


def test_pods_learn_of_each_other_while_they_come_go_and_come_back(cli: Cli, town: tuple[str, str], host: Host) -> None:
    cli.ok("run", "-d", "--name", "late", "-p", "8086:80", "box", "sh", "-c", f"rm -rf /tmp/w; {SERVE}")
    for _ in range(2):
        await_server(cli, "late")
        address = address_of(cli, "late")
        cli.ok("exec", "peer", "sh", "-c", f"until grep -w {address} /etc/hosts | grep -qw late; do sleep 0.1; done")
        assert fetched(host, "127.0.0.1", 8086) == cli.inspect("late")["id"][:12]
        cli.ok("restart", "-t", "0", "late")
    cli.ok("rm", "-f", "late")
    cli.ok("exec", "peer", "sh", "-c", "while grep -qw late /etc/hosts; do sleep 0.1; done")


# ---------------------------------------------------------------- load


@pytest.mark.parametrize("mib", [32, pytest.param(1024, marks=pytest.mark.long)])
def test_every_byte_arrives_in_both_directions(town: tuple[str, str], host: Host, mib: int) -> None:
    block = os.urandom(1 << 20)
    sent, received = hashlib.sha256(), hashlib.sha256()

    def send(sock: socket.socket) -> None:
        for number in range(mib):
            data = number.to_bytes(8, "big") + block[8:]
            sent.update(data)
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    with host.within(lambda: socket.create_connection((town[0], 7), timeout=PATIENCE)) as sock:
        sending = threading.Thread(target=send, args=(sock,))
        sending.start()
        count = 0
        while data := sock.recv(1 << 20):
            received.update(data)
            count += len(data)
        sending.join()
    assert (count, received.digest()) == (mib << 20, sent.digest())


def test_two_hundred_connections_are_open_at_once(town: tuple[str, str], host: Host) -> None:
    def connect() -> list[socket.socket]:
        return [socket.create_connection((town[0], 7), timeout=3 * PATIENCE) for _ in range(200)]

    with ExitStack() as stack:
        open_at_once = [stack.enter_context(sock) for sock in host.within(connect)]
        for number, sock in enumerate(open_at_once):
            sock.sendall(b"%03d" % number)
        said = [sock.recv(3, socket.MSG_WAITALL) for sock in reversed(open_at_once)]
    assert said == [b"%03d" % number for number in reversed(range(200))]


# ---------------------------------------------------------------- refusals


@contextmanager
def untouched(cli: Cli, host: Host) -> Iterator[None]:
    """Nothing of the host's network changes during the block, and no pod stays."""
    before = (host.state(), host.rules(), [row["id"] for row in cli.ps()])
    yield
    assert (host.state(), host.rules(), [row["id"] for row in cli.ps()]) == before


REFUSED = {
    "an unknown network": (("--network", "nowhere"), "unknown network 'nowhere'"),
    "the host's network": (("--network", "host"), "network 'host' is refused"),
    "the host's namespace": (("--network", "ns:/proc/self/ns/net"), "cannot join the host's network"),
    "no namespace": (("--network", "ns:/etc/passwd"), "'/etc/passwd' is not a network namespace"),
    "a missing namespace": (("--network", "ns:/run/netns/nowhere"), "cannot use network namespace"),
    "a port that a pod has": (("-p", "8080:80"), "port '8080/tcp' of the host is in use"),
    "a port that is none": (("-p", "99999:80"), "port '99999:80' is out of range"),
    "an address the host has not": (("-p", "192.0.2.99:9000:80"), "cannot publish at '192.0.2.99'"),
    "an address without a network of its kind": (("-p", "[2001:db8::9]:9000:80"), "the default network has no IPv6"),
    "the loopback of IPv6": (("-p", "[::1]:9000:80"), "cannot publish at '::1'"),
    "more ports than files": (("-p", "20000-21023:20000-21023"), "raise the limit of open files (ulimit -n)"),
    "an address of another network": (("--ip", "192.168.77.7"), "address '192.168.77.7' is not of the default network"),
    "an address that is none": (("--ip", "10.92.0"), "'10.92.0' (--ip) is not an IP address"),
    "a port without a network": (("--network", "none", "-p", "8082:80"), "'-p' needs the default network"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_one_clear_error(cli: Cli, town: tuple[str, str], host: Host, what: str) -> None:
    options, reason = REFUSED[what]
    with untouched(cli, host), few_files(cli) if "open files" in reason else nullcontext():
        done = cli("run", "--rm", *options, "box", "true")
    assert done.code == 125, done
    assert reason in last_line(done.stderr), done


@contextmanager
def few_files(cli: Cli) -> Iterator[None]:
    """Commands of the block may have few files open."""
    before = cli.prefix
    cli.prefix = (*before, "prlimit", "--nofile=512:512")
    try:
        yield
    finally:
        cli.prefix = before


def last_line(text: str) -> str:
    return next(line for line in reversed(text.splitlines()) if line.startswith("vmsandbox: "))


def test_an_address_in_use_is_one_clear_error(cli: Cli, town: tuple[str, str], host: Host) -> None:
    with untouched(cli, host):
        done = cli("run", "--rm", "--ip", town[0], "box", "true")
    assert done.code == 125
    assert f"address '{town[0]}' is in use by another pod" in done.stderr


def test_a_port_of_another_program_is_one_clear_error(cli: Cli, town: tuple[str, str], host: Host) -> None:
    with host.within(lambda: socket.create_server(("127.0.0.1", 8090))), untouched(cli, host):
        done = cli("run", "--rm", "-p", "8090:80", "box", "true")
    assert done.code == 125
    assert "port '8090/tcp' of the host is in use" in done.stderr


@contextmanager
def configured(cli: Cli, directory: Path, text: str) -> Iterator[None]:
    """Commands of the block read these settings of the network."""
    cli.config = directory / "config.toml"
    cli.config.write_text(f"[network]\n{text}\n[sandbox]\nforks = false\n")
    try:
        yield
    finally:
        cli.config = None


def test_a_port_that_only_old_connections_have_is_free(cli: Cli, host: Host) -> None:
    def wait_in_time() -> None:
        """Leave a connection in TIME-WAIT at the port."""
        with socket.create_server(("127.0.0.1", 8091)) as server:
            client = socket.create_connection(("127.0.0.1", 8091))
            connection, _ = server.accept()
            connection.close()
            client.close()

    host.within(wait_in_time)
    cli.ok("run", "--rm", "-p", "8091:80", "box", "true")


@pytest.mark.parametrize("missing", PLUGINS)
def test_a_missing_plugin_is_one_clear_error(cli: Cli, host: Host, tmp_path: Path, missing: str) -> None:
    for name in set(PLUGINS) - {missing}:
        program = cni.located(name, Settings().network.plugins.split(":"))
        assert program is not None
        (tmp_path / name).symlink_to(program)
    with configured(cli, tmp_path, f'plugins = "{tmp_path}"'):
        with untouched(cli, host):
            done = cli("run", "--rm", "box", "true")
        assert done.code == 125
        assert f"network plugin '{missing}' is not in" in last_line(done.stderr)
        assert "install 'containernetworking-plugins', or run with '--network none'" in last_line(done.stderr)
        cli.ok("gc", "-q")


def test_a_pod_without_a_network_needs_no_plugin(cli: Cli, host: Host, tmp_path: Path) -> None:
    with configured(cli, tmp_path, f'plugins = "{tmp_path}"'):
        assert cli.ok("run", "--rm", "--network", "none", "box", "ip", "-o", "link").count("\n") == 1


def test_a_guest_does_not_reach_the_hosts_loopback(cli: Cli, town: tuple[str, str], host: Host) -> None:
    """Where a port is published, the host's kernel routes such addresses: whoever asks for them must not get there."""
    reach = (
        "gateway=$(ip route | sed -n 's/default via \\([0-9.]*\\).*/\\1/p'); ip addr flush dev lo; "
        "ip route flush table local dev lo; echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet; "
        "ip route add 127.0.0.0/8 via $gateway dev eth0; nc -w 5 127.0.0.1 9999"
    )
    with host.within(lambda: socket.create_server(("127.0.0.1", 9999))) as server:
        done = cli("run", "--rm", "--privileged", "-p", "8085:80", "box", "sh", "-c", reach)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert done.code != 0


# ---------------------------------------------------------------- ends


def test_a_pod_keeps_its_network_when_its_supervisor_is_killed_and_the_host_gets_it_back_in_the_end(
    cli: Cli, town: tuple[str, str], host: Host
) -> None:
    with untouched(cli, host):
        others = {process.pid for process in cli.processes()}
        cli.ok("run", "-d", "--name", "doomed", "-p", "8083:80", "box", "sh", "-c", SERVE)
        await_server(cli, "doomed")
        assert fetched(host, "127.0.0.1", 8083) == cli.inspect("doomed")["id"][:12]
        for pid in own(cli, others, "vmsandbox supervisor"):
            kill(pid)
        assert cli.ok("exec", "doomed", "fetch", "web") == "webhost\n"
        assert fetched(host, "127.0.0.1", 8083) == cli.inspect("doomed")["id"][:12]
        done = cli("run", "--rm", "-p", "8083:80", "box", "true")
        assert "port '8083/tcp' of the host is in use" in done.stderr
        while left := own(cli, others, ""):  # a stand-in that dies late starts another supervisor
            for pid in left:
                kill(pid)
                wait_until_gone(pid)
        cli.ok("gc", "-q")
        cli.ok("rm", "-f", "doomed")
        assert own(cli, others, "") == []


def own(cli: Cli, others: set[int], called: str) -> list[int]:
    """Processes that are not the others', with a title."""
    found = [process for process in cli.processes() if process.pid not in others]
    return [process.pid for process in found if called in title(process)]


# ---------------------------------------------------------------- another network


def test_a_container_has_no_network_if_it_is_told_so(cli: Cli) -> None:
    said = cli.ok("run", "--rm", "--network", "none", "box", "sh", "-c", "ip -o link; ip route; cat /etc/hosts")
    assert "lo:" in said
    assert "eth0" not in said
    assert "default" not in said


def test_files_can_be_told_a_pod_that_has_no_network(cli: Cli) -> None:
    options = ("--network", "none", "--dns", "192.0.2.53", "--dns-search", "example.test", "--add-host", "db:10.1.2.3")
    said = cli.ok("run", "--rm", *options, "box", "cat", "/etc/resolv.conf", "/etc/hosts")
    for line in ("nameserver 192.0.2.53", "search example.test", "10.1.2.3\tdb"):
        assert line in said


BAD_RANGES = {
    "10.93.0.7/16": "'10.93.0.7/16' is not a network",
    "10.93.0.0/31": "too small",
    "127.0.0.0/8": "hosts cannot have",
    f"{hosts.ADDRESS}/32": "too small",
    str(ipaddress.ip_network(f"{hosts.ADDRESS}/24", strict=False)): "the host uses",
}


def test_the_default_network_is_as_configured_once_no_pod_is_on_it(cli: Cli, host: Host, tmp_path: Path) -> None:
    cli.remove_all()
    with untouched(cli, host):
        for subnet, why in BAD_RANGES.items():
            with configured(cli, tmp_path, f'subnet = "{subnet}"'):
                done = cli("run", "--rm", "box", "true")
                assert done.code == 125
                assert why in last_line(done.stderr)
                cli.ok("gc", "-q")
        with configured(cli, tmp_path, 'subnet = "10.93.0.0/16"\nipv6 = true'):
            options = ("-p", f"[{hosts.ADDRESS6}]:8084:80")
            cli.ok("run", "-d", "--name", "six", *options, "box", "sh", "-c", SERVE)
            await_server(cli, "six")
            assert address_of(cli, "six").startswith("10.93.")
            assert address_of(cli, "six", family="inet6").startswith("fd")
            assert "1 packets received" in cli.ok("exec", "six", "ping", "-6", "-c", "1", "-W", "20", hosts.WORLD6)
            assert fetched(host.world, hosts.ADDRESS6, 8084) == cli.inspect("six")["id"][:12]
            chosen = str(ipaddress.ip_address(address_of(cli, "six", family="inet6")) + 77)
            said = cli.ok("run", "--rm", "--ip", chosen, "box", "ip", "-o", "addr", "show", "dev", "eth0")
            assert f"{chosen}/64" in said
            with host.within(lambda: socket.create_server(("::", 8086), family=socket.AF_INET6)):
                done = cli("run", "--rm", "-p", "8086:80", "box", "true")
                assert "port '8086/tcp' of the host is in use" in last_line(done.stderr)
            cli.ok("rm", "-f", "six")
