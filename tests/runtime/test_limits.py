"""Resources as the guest keeps them: what its control group says, and what a program is denied."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from tests.harness.members import CGROUP, Members

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.bundles import Runtime

MIB = 1 << 20
#: a policy that only a program without children can have
DEADLINE = {"policy": "SCHED_DEADLINE", "runtime": 10_000_000, "deadline": 30_000_000, "period": 30_000_000}
#: files of a control group that updates are about
CHANGED = ("cpu.weight", "cpu.max", "memory.max", "memory.swap.max", "memory.low", "pids.max")
NO_WEIGHTS = "the guest's kernel has no weights of block I/O"


def weight(shares: int) -> str:
    """What cgroup v2 makes of v1's shares, as runc and crun say it."""
    return str(1 + (shares - 2) * 9999 // 262142)


def test_limits_are_the_guests_control_group_and_updates_change_it(
    runtime: Runtime, box_rootfs: Path, disk: str
) -> None:
    members = Members(runtime, box_rootfs)
    status = os.stat(disk)
    numbers = {"major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev)}

    def limited(document: dict[str, Any]) -> None:
        document["linux"]["devices"] = [{"path": "/dev/data", "type": "b", **numbers}]
        document["linux"]["resources"] = {
            "devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "b", "access": "rwm", **numbers}],
            "cpu": {"shares": 512, "quota": 30000, "period": 60000},
            "memory": {"limit": 128 * MIB, "swap": 192 * MIB, "reservation": 64 * MIB},
            "pids": {"limit": 77},
            "unified": {"memory.high": str(96 * MIB), "memory.oom.group": "1"},
            "blockIO": {
                "throttleReadBpsDevice": [{**numbers, "rate": 5 * MIB}],
                "throttleWriteBpsDevice": [{**numbers, "rate": 6 * MIB}],
                "throttleReadIOPSDevice": [{**numbers, "rate": 70}],
                "throttleWriteIOPSDevice": [{**numbers, "rate": 80}],
            },
        }

    members.start("one", limited)
    found = members.read("one", *CHANGED, "memory.high", "memory.oom.group", "io.max")
    assert found.pop("io.max").split()[1:] == [f"rbps={5 * MIB}", f"wbps={6 * MIB}", "riops=70", "wiops=80"]
    assert found == {
        "cpu.weight": weight(512),
        "cpu.max": "30000 60000",
        "memory.max": str(128 * MIB),
        "memory.swap.max": str(64 * MIB),
        "memory.low": str(64 * MIB),
        "pids.max": "77",
        "memory.high": str(96 * MIB),
        "memory.oom.group": "1",
    }

    # What an update does not name stays as it is.
    runtime.ok("update", "--cpu-share", "2048", "--pids-limit", "88", "one")
    assert members.read("one", *CHANGED) == {
        **{name: found[name] for name in CHANGED},
        "cpu.weight": weight(2048),
        "pids.max": "88",
    }
    memory = ("--memory", "100m", "--memory-swap", "110m", "--memory-reservation", "90m")
    runtime.ok("update", *memory, "--cpu-period", "50000", "--cpu-quota", "20000", "--pids-limit", "-1", "one")
    assert members.read("one", *CHANGED) == {
        "cpu.weight": weight(2048),
        "cpu.max": "20000 50000",
        "memory.max": str(100 * MIB),
        "memory.swap.max": str(10 * MIB),
        "memory.low": str(90 * MIB),
        "pids.max": "max",
    }
    unified = {"unified": {"memory.high": "max", "pids.max": "99"}, "memory": {"limit": 120 * MIB}}
    runtime.ok("update", "--resources", "-", "one", stdin=json.dumps(unified).encode())
    expected = {"memory.high": "max", "pids.max": "99", "memory.max": str(120 * MIB)}
    assert members.read("one", *expected) == expected

    # Weights of block I/O need a scheduler that the packaged kernel does not have.
    weights = ("weight", 300), ("weightDevice", [{**numbers, "weight": 500}])
    for name, value in weights if "io.weight" not in runtime.ok("exec", "one", "ls", CGROUP) else ():

        def weighted(document: dict[str, Any], name: str = name, value: Any = value) -> None:
            limited(document)
            document["linux"]["resources"]["blockIO"][name] = value

        said = runtime.refused("create", "--bundle", str(members.bundle(name, weighted, "true")), name)
        assert said == f"'linux.resources.blockIO.{name}' is not supported: {NO_WEIGHTS}"
        assert "'linux.resources.blockIO.weight'" in runtime.refused("update", "--blkio-weight", "300", "one")
    assert runtime.ok("list", "-q").split() == ["one", "pause"]


def test_devices_that_no_rule_allows_are_denied_to_a_program(runtime: Runtime, box_rootfs: Path) -> None:
    members = Members(runtime, box_rootfs)
    fuse = {"type": "c", "major": 10, "minor": 229}
    #: kmsg and fuse are none of those that every container may use
    script = "mknod /tmp/kmsg c 1 11 && cat /tmp/kmsg; cat /dev/fuse; cat /dev/null && echo null"
    said = {}
    for name, rules in {
        "none": [],
        "fuse": [{"allow": True, "access": "r", **fuse}],
        "later": [{"allow": True, "access": "r", **fuse}, {"allow": False, "access": "r", **fuse}],
        "written": [{"allow": True, "access": "w", **fuse}],
    }.items():

        def ruled(document: dict[str, Any], rules: Any = rules) -> None:
            document["linux"]["devices"] = [{"path": "/dev/fuse", **fuse}]
            document["linux"]["resources"] = {"devices": [{"allow": False, "access": "rwm"}, *rules]}
            for kind in ("bounding", "effective", "permitted"):
                document["process"]["capabilities"][kind].append("CAP_MKNOD")
            document["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})

        done = runtime("run", "--bundle", str(members.bundle(name, ruled, "sh", "-c", script)), name)
        assert done.stdout == "null\n", done
        said[name] = done.stderr.splitlines()
    denied = [
        "cat: can't open '/tmp/kmsg': Operation not permitted",
        "cat: can't open '/dev/fuse': Operation not permitted",
    ]
    # The file system in user space is not there, but the device may be read.
    allowed = [denied[0], "cat: read error: Operation not permitted"]
    assert said == {"none": denied, "fuse": allowed, "later": denied, "written": denied}


def test_a_deadline_is_given_to_a_container_and_to_an_exec(runtime: Runtime, box_rootfs: Path) -> None:
    # One process: what has a deadline cannot have children.
    wait = (
        'BEGIN { while (f[41] != 6) { getline line < "/proc/self/stat"; close("/proc/self/stat"); split(line, f, " ") }'
    )
    program = ["awk", wait + "; print f[41] }"]
    members = Members(runtime, box_rootfs)

    def hasty(document: dict[str, Any]) -> None:
        document["process"]["scheduler"] = DEADLINE

    assert runtime.ok("run", "--bundle", str(members.bundle("hasty", hasty, *program)), "hasty") == "6\n"
    members.start("slow", lambda _: None)
    process = {"args": program, "cwd": "/", "env": ["PATH=/bin"], "scheduler": DEADLINE}
    (runtime.scratch / "process.json").write_text(json.dumps(process))
    assert runtime.ok("exec", "--process", str(runtime.scratch / "process.json"), "slow") == "6\n"
