"""What a pod's network is worth, against two containers of crun on the same bridge.

Everything happens in a network namespace that plays the host: pods are on the default network there, and the native
containers have cables to its bridge.  Traffic goes from one pod to another, and from a pod to the host.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from scripts.benchmarks import processes
from scripts.benchmarks.processes import CommandError
from scripts.benchmarks.rows import MissingError, Row, measurement
from scripts.benchmarks.workplace import PARENT_TIME

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scripts.benchmarks.workplace import Workplace

IMAGE = "bench-network"
IPERF_PORT, ECHO_PORT = 5201, 7
#: seconds of one throughput
SECONDS = 3
#: starts with and without an interface, one beside the other
PAIRS = 9
MIB = 1024 * 1024
#: what the containers run: both servers, whose ends are theirs
SERVE = f"iperf3 -s -p {IPERF_PORT} >/dev/null 2>&1 & exec python3 /traffic.py serve {ECHO_PORT}"
READY = f"until python3 /traffic.py ask 127.0.0.1 {ECHO_PORT}; do sleep 0.1; done >/dev/null 2>&1"
KEEPER = "ip link set lo up; echo ready; exec sleep 1000000"
TRAFFIC = Path(__file__).with_name("traffic.py")
PYTHON = Path("/usr/bin/python3")
LIBRARY = Path("/usr/lib/python3.11")
#: from and to what, in the names of rows
PATHS = {"": "from pod to pod", "_host": "from pod to host"}


class Town:
    """The namespace, two pods, two native containers, and servers on the host."""

    def __init__(self, place: Workplace, stack: ExitStack) -> None:
        self.place = place
        self._stack = stack
        apart = ("unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec", KEEPER)
        keeper = subprocess.Popen(apart, stdout=subprocess.PIPE)
        stack.callback(_end, keeper)
        assert keeper.stdout is not None
        if keeper.stdout.readline() != b"ready\n":
            raise MissingError("no network namespace can be made")
        self.prefix = ("nsenter", "-t", str(keeper.pid), "--net", "--mount")
        self.rootfs = _rootfs(place)
        _ = place.template
        place.vmsandbox("image", "import", "--name", IMAGE, f"rootfs:{self.rootfs}")
        self.pods = [self._pod(f"net-{number}") for number in range(2)]
        # What a filter leaves out is there as an empty object.
        (shown,) = filter(None, json.loads(self.call("ip", "-j", "-4", "addr", "show", "type", "bridge")))
        self.bridge, gateway = str(shown["ifname"]), shown["addr_info"][0]
        self.host = str(gateway["local"])
        self.natives = [self._native(number, int(gateway["prefixlen"])) for number in range(2)]
        for server in (("iperf3", "-s", "-p", str(IPERF_PORT)), (str(PYTHON), str(TRAFFIC), "serve", str(ECHO_PORT))):
            stack.callback(_end, subprocess.Popen([*self.prefix, *server], stdout=subprocess.DEVNULL))

    def call(self, *words: str) -> str:
        """What a program prints on this host."""
        return processes.run([*self.prefix, *words]).output

    def run(self, *words: str) -> float:
        """Seconds that a verb of ours takes here."""
        return processes.run([*self.prefix, *self.place.command(*words)]).seconds

    def _pod(self, name: str) -> tuple[tuple[str, ...], str]:
        """How to run something in a new pod, and its address."""
        options = ("--network", "default", "--template=require")
        self.run("run", "-d", "--name", name, *options, IMAGE, "sh", "-c", SERVE)
        self._stack.callback(partial(self._quietly, "rm", "-f", name))
        inside = (*self.prefix, *self.place.command("exec", name))
        processes.run([*inside, "sh", "-c", READY])
        shown = processes.run([*inside, "ip", "-o", "-4", "addr", "show", "eth0"]).output
        return inside, shown.partition("inet ")[2].partition("/")[0]

    def _quietly(self, *words: str) -> None:
        with contextlib.suppress(CommandError):
            self.run(*words)

    def _native(self, number: int, prefix: int) -> tuple[tuple[str, ...], str]:
        """The same for a container of crun with a cable to the bridge."""
        crun = self.place.tool("crun")
        name, root = f"bench-net-{number}", str(self.place.directory / "crun-net")
        bundle = self.place.directory / name
        bundle.mkdir()
        subprocess.run([crun, "spec"], cwd=bundle, check=True, capture_output=True)
        spec = json.loads((bundle / "config.json").read_text())
        spec["process"].update(args=["sh", "-c", SERVE], terminal=False)
        spec["root"].update(path=str(self.rootfs), readonly=True)
        spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})
        (bundle / "config.json").write_text(json.dumps(spec))
        argv = [*self.prefix, crun, "--root", root]
        with open(os.devnull, "r+b") as null:  # it keeps them
            subprocess.run([*argv, "run", "-d", "-b", str(bundle), name], check=True, stdin=null, stdout=null)
        self._stack.callback(lambda: subprocess.run([*argv, "delete", "-f", name], check=False, capture_output=True))
        pid = json.loads(subprocess.run([*argv, "state", name], check=True, capture_output=True).stdout)["pid"]
        network, _, _ = self.host.rpartition(".")
        address = f"{network}.{240 + number}"
        self.call("ip", "link", "add", f"native{number}", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self.call("ip", "link", "set", f"native{number}", "master", self.bridge, "up")
        for words in (("addr", "add", f"{address}/{prefix}", "dev", "eth0"), ("link", "set", "eth0", "up")):
            processes.run([*self.prefix, "nsenter", "-t", str(pid), "--net", "ip", *words])
        inside = (*argv, "exec", name)
        processes.run([*inside, "sh", "-c", READY])
        return inside, address

    def throughput(self, source: tuple[str, ...], target: str) -> float:
        """MiB/s that a container sends."""
        argv = [*source, "iperf3", "-c", target, "-p", str(IPERF_PORT), "-t", str(SECONDS), "-J"]
        answer = json.loads(processes.run(argv).output)
        if "sum_received" not in answer["end"]:
            raise CommandError(f"iperf3: {answer.get('error')}")
        return float(answer["end"]["sum_received"]["bits_per_second"]) / 8 / MIB

    def asked(self, source: tuple[str, ...], target: str) -> dict[str, float]:
        argv = [*source, "python3", "/traffic.py", "ask", target, str(ECHO_PORT)]
        answer: dict[str, float] = json.loads(processes.run(argv).output)
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _rootfs(place: Workplace) -> Path:
    """The benchmark's root file system with iperf3, Python and what they need."""
    if not LIBRARY.is_dir():
        raise MissingError(f"no Python in '{LIBRARY}': install python3")
    target = place.directory / "rootfs-net"
    shutil.copytree(place.rootfs, target, symlinks=True)
    (target / "bin/ip").symlink_to("busybox")
    for program in (Path(place.tool("iperf3")), PYTHON.resolve()):
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        for path in (program, *(Path(word) for word in listed.split() if word.startswith("/"))):
            copy = target / path.relative_to("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                shutil.copy(path, copy)
    (target / "bin/python3").symlink_to(PYTHON.resolve())
    if not (target / "bin/iperf3").exists():
        (target / "bin/iperf3").symlink_to(place.tool("iperf3"))
    ignored = shutil.ignore_patterns("test", "idlelib", "lib2to3", "ensurepip", "pydoc_data", "config-*")
    shutil.copytree(LIBRARY, target / LIBRARY.relative_to("/"), symlinks=True, ignore=ignored, dirs_exist_ok=True)
    shutil.copy(TRAFFIC, target / "traffic.py")
    (target / "tmp").mkdir(exist_ok=True)
    return target


_towns: WeakKeyDictionary[Workplace, Town] = WeakKeyDictionary()


def town(place: Workplace) -> Town:
    """The one of this workplace."""
    if place not in _towns:
        for program in ("ip", "iptables", "nsenter", "iperf3", "crun"):
            place.tool(program)
        with ExitStack() as stack:
            _towns[place] = Town(place, stack)
            place.keep(stack)
    return _towns[place]


@measurement(
    *(
        Row(f"net_throughput{suffix}", "MiB/s", f"iperf3 {text}", against=f"native_net_throughput{suffix}")
        for suffix, text in PATHS.items()
    ),
    *(Row(f"native_net_throughput{suffix}", "MiB/s", f"iperf3 {text}, of crun") for suffix, text in PATHS.items()),
    most_runs=3,
    warm_up=False,
)
def net_throughput(place: Workplace) -> Mapping[str, float]:
    here = town(place)
    (pod, _), (_, pod_address) = here.pods
    (native, _), (_, native_address) = here.natives
    return {
        "net_throughput": here.throughput(pod, pod_address),
        "native_net_throughput": here.throughput(native, native_address),
        "net_throughput_host": here.throughput(pod, here.host),
        "native_net_throughput_host": here.throughput(native, here.host),
    }


@measurement(
    *(
        Row(f"{row}{suffix}", "us", f"{what} {text}", against=f"native_{row}{suffix}")
        for row, what in (("net_latency", "a byte by TCP and back"), ("net_connect", "a new TCP connection"))
        for suffix, text in PATHS.items()
    ),
    *(
        Row(f"native_{row}{suffix}", "us", f"{what} {text}, of crun")
        for row, what in (("net_latency", "a byte by TCP and back"), ("net_connect", "a new TCP connection"))
        for suffix, text in PATHS.items()
    ),
    most_runs=3,
)
def net_latency(place: Workplace) -> Mapping[str, float]:
    here = town(place)
    (pod, _), (_, pod_address) = here.pods
    (native, _), (_, native_address) = here.natives
    found: dict[str, float] = {}
    for prefix, source, neighbour in (("", pod, pod_address), ("native_", native, native_address)):
        for suffix, target in (("", neighbour), ("_host", here.host)):
            for name, seconds in here.asked(source, target).items():
                found[f"{prefix}net_{name}{suffix}"] = seconds * 1e6
    return found


@measurement(Row("net_start", "s", f"what the default network adds to a start, median of {PAIRS} pairs"))
def net_start(place: Workplace) -> Mapping[str, float]:
    """One beside the other, several times: a single start varies by more than what an interface adds."""
    here = town(place)

    def start(network: str) -> float:
        name = f"net-start-{network}-{time.monotonic_ns()}"
        options = ("--network", network, "--template=require")
        seconds = here.run("run", "-d", "--name", name, *options, IMAGE, "sleep", "1000000")
        here.run("rm", "-f", name)
        return seconds

    for _ in range(2):
        start("none")
        time.sleep(PARENT_TIME)  # in which a machine is made that the others are forked from
    return {"net_start": statistics.median([-start("none") + start("default") for _ in range(PAIRS)])}
