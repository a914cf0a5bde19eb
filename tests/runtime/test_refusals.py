"""Everything that is refused, asked of one pod: an error that names the member, and the pod is as it was."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.bundles import Runtime
from tests.harness.members import Members

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HUGE = 100_000_000
#: a device that this host need not have, and no guest does
SERIAL = os.makedev(4, 64)


@pytest.fixture(scope="module")
def members(box_rootfs: Path, data_root: Path) -> Iterator[Members]:
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        runtime = Runtime(Path(scratch), data_root)
        os.mknod(runtime.scratch / "serial", 0o600 | stat.S_IFCHR, SERIAL)
        try:
            yield Members(runtime, box_rootfs)
        finally:
            runtime.remove_all()
        assert runtime.leftovers() == []


def put(value: Any, *where: str) -> Callable[[dict[str, Any]], None]:
    """Changes one member of a document; lists get another entry."""

    def change(document: dict[str, Any]) -> None:
        inside = document
        for key in where[:-1]:
            inside = inside.setdefault(key, {})
        if isinstance(inside.get(where[-1]), list) and not isinstance(value, list):
            inside[where[-1]].append(value)
        else:
            inside[where[-1]] = value

    return change


def resource(value: Any, *where: str) -> Callable[[dict[str, Any]], None]:
    return put(value, "linux", "resources", *where)


def namespace(kind: str, path: str | None) -> Callable[[dict[str, Any]], None]:
    """Has a namespace of a path, of its own (""), or none of a kind."""

    def change(document: dict[str, Any]) -> None:
        found = document["linux"]["namespaces"]
        found[:] = [each for each in found if each["type"] != kind]
        if path is not None:
            found.append({"type": kind, "path": path})

    return change


def both(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for each in changes:
            each(document)

    return change


MAPPING = [{"containerID": 0, "hostID": 0, "size": 65536}]
with_user = both(namespace("user", ""), put(MAPPING, "linux", "uidMappings"), put(MAPPING, "linux", "gidMappings"))
RATE = {"major": 8, "minor": 250, "rate": 1000}
#: what the error names -> what is asked for
CONFIGS: dict[str, Callable[[dict[str, Any]], None]] = {
    "process.rlimits[0].hard": put([{"type": "RLIMIT_CORE", "soft": 2, "hard": -1}], "process", "rlimits"),
    "process.scheduler.policy' is 'SCHED_ISO": put({"policy": "SCHED_ISO"}, "process", "scheduler"),
    "process.oomScoreAdj": put(2000, "process", "oomScoreAdj"),
    "process.args": put([], "process", "args"),
    "process.cwd": put("relative", "process", "cwd"),
    "'root.path' is '/no/such'": put("/no/such", "root", "path"),
    "].type' is 'nfs'": put({"destination": "/n", "type": "nfs", "source": "x:/"}, "mounts"),
    "maps ids": put({"destination": "/n", "type": "bind", "source": "/etc", "uidMappings": MAPPING}, "mounts"),
    "cannot use the source '/no/such'": put(
        {"destination": "/n", "type": "bind", "source": "/no/such", "options": ["rbind"]}, "mounts"
    ),
    "device 4:64 is the host's": put(
        {"destination": "/n", "type": "bind", "source": "../serial", "options": ["bind"]}, "mounts"
    ),
    "hooks.prestart[0].path": put([{"path": "relative"}], "hooks", "prestart"),
    "hooks.createRuntime[0].timeout": put([{"path": "/bin/true", "timeout": -1}], "hooks", "createRuntime"),
    "prestart hook #0 '/bin/false' failed with status 1": put([{"path": "/bin/false"}], "hooks", "prestart"),
    "createContainer hook #0 '/bin/false' failed": put([{"path": "/bin/false"}], "hooks", "createContainer"),
    "no pid namespace": namespace("pid", None),
    "no ipc namespace": namespace("ipc", None),
    "no mount namespace": namespace("mount", None),
    "no network namespace": namespace("network", None),
    "joins the pid namespace '/proc/1/ns/pid'": namespace("pid", "/proc/1/ns/pid"),
    "joins the user namespace": both(with_user, namespace("user", "/proc/1/ns/user")),
    "joins the time namespace": namespace("time", "/proc/1/ns/time"),
    "joins a mount namespace": namespace("mount", "/proc/1/ns/mnt"),
    "joins a cgroup namespace": namespace("cgroup", "/proc/1/ns/cgroup"),
    "asks for a new network": namespace("network", ""),
    "'linux.uidMappings' is empty": namespace("user", ""),
    "a time namespace beside a user namespace": both(with_user, namespace("time", "")),
    "'linux.cgroupsPath'": put("system.slice:runc:x", "linux", "cgroupsPath"),
    "'linux.devices[0]' is '/dev/kvm'": put(
        [{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}], "linux", "devices"
    ),
    "disk 8:250": put([{"path": "/dev/x", "type": "b", "major": 8, "minor": 250}], "linux", "devices"),
    "'linux.intelRdt'": put({"closID": "x"}, "linux", "intelRdt"),
    "'linux.seccomp.listenerPath'": put({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}, "linux", "seccomp"),
    "'kernel.panic', which belongs to no namespace": put({"kernel.panic": "1"}, "linux", "sysctl"),
    "'net.core.somaxconn', which is the pod's": put({"net.core.somaxconn": "9"}, "linux", "sysctl"),
    "memory.disableOOMKiller": resource(True, "memory", "disableOOMKiller"),
    "cpu.realtimeRuntime": resource(5, "cpu", "realtimeRuntime"),
    "'linux.resources.network'": resource({"classID": 5}, "network"),
    "'linux.resources.rdma'": resource({"mlx5_0": {"hcaHandles": 5}}, "rdma"),
    "blockIO.leafWeight": resource(500, "blockIO", "leafWeight"),
    "8:250": resource([RATE], "blockIO", "throttleReadBpsDevice"),
    "no processor 8191": resource("8191", "cpu", "cpus"),
    "no memory node 1023": resource("1023", "cpu", "mems"),
    # Those that are found out in the guest only.
    "'linux.resources.unified' sets 'memory.high' to 'junk'": resource({"memory.high": "junk"}, "unified"),
    "'linux.resources.memory.limit' ('--memory') is 4096": resource({"limit": 4096}, "memory"),
    "cannot mount devpts at '/n': the guest's kernel refuses option 'gid=junk'": put(
        {"destination": "/n", "type": "devpts", "source": "none", "options": ["gid=junk"]}, "mounts"
    ),
    "cannot mount configfs at '/n'": put({"destination": "/n", "type": "configfs", "source": "none"}, "mounts"),
    "cannot mount proc at '/n/proc'": put({"destination": "/n/proc", "type": "proc", "source": "none"}, "mounts"),
    "'linux.maskedPaths' names '/etc/passwd/x'": put(["/etc/passwd/x"], "linux", "maskedPaths"),
    "'linux.readonlyPaths' names '/etc/passwd/x'": put(["/etc/passwd/x"], "linux", "readonlyPaths"),
    "'linux.devices' names '/etc/passwd/x'": put(
        [{"path": "/etc/passwd/x", "type": "c", "major": 1, "minor": 3}], "linux", "devices"
    ),
    "'linux.sysctl' sets 'kernel.shm_rmid_forced' to '7'": both(
        with_user, namespace("ipc", ""), put({"kernel.shm_rmid_forced": "7"}, "linux", "sysctl")
    ),
    # Those that the host knows of the guest's kernel.
    "'effective' has 'CAP_SYS_BOOT', which is not in 'permitted'": put(
        ["CAP_SYS_BOOT"], "process", "capabilities", "effective"
    ),
    "'quota' is 10: 1000 is the least": resource({"quota": 10}, "cpu"),
    "'process.user.uid' is 70000, which 'linux.uidMappings' does not have": both(
        with_user, put(70000, "process", "user", "uid")
    ),
    "annotation 'io.kubernetes.cri.container-type' is 'x'": put("x", "annotations", "io.kubernetes.cri.container-type"),
    "first container 'nosuch' is not known": put("nosuch", "annotations", "io.kubernetes.cri.sandbox-id"),
    "console socket": put(True, "process", "terminal"),
}


#: malformed process objects, as text or as what is changed in a good one -> what the error says
PROCESSES: dict[str, Any] = {
    "is not valid JSON": b'{"args": ["true"',
    "is not a JSON object": b"[]",
    "does not exist": None,
    "is larger than": b" " * HUGE,
    "'args' is empty": {"args": []},
    "'args' should be": {"args": "true"},
    "'args[0]' should be": {"args": [1]},
    "'cwd'": {"cwd": 5},
    "'user.uid'": {"user": {"uid": -1}},
    "'user.additionalGids'": {"user": {"uid": 0, "gid": 0, "additionalGids": "x"}},
    "'env'": {"env": {"A": "b"}},
    "'capabilities": {"capabilities": ["CAP_KILL"]},
    "'rlimits[0].hard'": {"rlimits": [{"type": "RLIMIT_CORE", "soft": 1, "hard": -1}]},
    "'scheduler'": {"scheduler": "SCHED_FIFO"},
    "SCHED_ISO": {"scheduler": {"policy": "SCHED_ISO"}},
    "'oomScoreAdj'": {"oomScoreAdj": 1.5},
}
#: malformed documents of an update
UPDATES: dict[str, Any] = {
    "is not valid JSON": b'{"memory": ',
    "is not a JSON object": b"7",
    "does not exist": None,
    "is larger than": b" " * HUGE,
    "'memory'": {"memory": 5},
    "'memory.limit'": {"memory": {"limit": "5m"}},
    "'cpu.shares'": {"cpu": {"shares": -1}},
    "'pids.limit'": {"pids": {"limit": 2**70}},
    "'unified": {"unified": {"memory.high": 5}},
    "'hugepageLimits[0].pageSize'": {"hugepageLimits": [{"pageSize": "x", "limit": 5}]},
    "disableOOMKiller": {"memory": {"disableOOMKiller": True}},
    "realtimeRuntime": {"cpu": {"realtimeRuntime": 5}},
    "no processor 8191": {"cpu": {"cpus": "8191"}},
    "8:250": {"blockIO": {"throttleReadBpsDevice": [RATE]}},
    "sets 'memory.high' to 'junk'": {"unified": {"memory.high": "junk"}},
    "'quota' is 10": {"cpu": {"quota": 10}},
    "memory.nosuch": {"unified": {"memory.nosuch": "1"}},
    "'memory': 'swap' is 134217728, below 'limit'": {"memory": {"limit": 1 << 28, "swap": 1 << 27}},
}


def test_every_config_that_is_refused_leaves_the_pod_as_it_was(members: Members) -> None:
    runtime = members.runtime
    for number, (words, change) in enumerate(CONFIGS.items()):
        name = f"bad{number}"
        bundle = members.bundle(name, change, "true")
        message = runtime.refused("create", "--bundle", str(bundle), "--pid-file", str(bundle / "pid"), name)
        assert words in message
        assert "internal error" not in message
        assert [path.name for path in bundle.iterdir()] == ["config.json"]
        assert members.remains_alone(), words
    bundle = members.bundle("good", lambda _: None, "echo", "well")
    assert runtime.ok("run", "--bundle", str(bundle), "good") == "well\n"


def written(directory: Path, content: Any, base: dict[str, Any]) -> str:
    """A document: this text, the base with changes, or none at all."""
    path = directory / "document.json"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps({**base, **content}).encode())
    return str(path)


def test_a_process_that_is_malformed_is_refused_and_none_is_added(members: Members, tmp_path: Path) -> None:
    runtime, base = members.runtime, {"args": ["true"], "cwd": "/", "env": ["PATH=/bin"]}
    for words, content in PROCESSES.items():
        message = runtime.refused("exec", "--process", written(tmp_path, content, base), "pause")
        assert words in message
        assert "internal error" not in message
        assert members.remains_alone(), words
    runtime.ok("exec", "--process", written(tmp_path, {}, base), "pause")


def test_an_update_that_is_malformed_is_refused_and_changes_nothing(members: Members, tmp_path: Path) -> None:
    runtime = members.runtime
    files = ("memory.max", "cpu.weight", "cpu.max", "pids.max", "io.max")
    before = members.read("pause", *files)
    for words, content in UPDATES.items():
        message = runtime.refused("update", "--resources", written(tmp_path, content, {"cpu": {"shares": 77}}), "pause")
        assert words in message
        assert "internal error" not in message
        assert members.read("pause", *files) == before, words
    assert members.remains_alone()
