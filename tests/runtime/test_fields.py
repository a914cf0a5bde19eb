"""Fields of config.json that the guest honours although its crun, or the host, would not: what programs see of them."""

from __future__ import annotations

import json
import os
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.harness.boxes import make_rootfs
from tests.harness.bundles import edited

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.bundles import Runtime

MIB = 1 << 20
MAPPING = [{"containerID": 0, "hostID": 200000, "size": 65536}]


def test_a_user_namespace_and_scheduling(runtime: Runtime, tmp_path: Path) -> None:
    rootfs = make_rootfs(tmp_path / "rootfs")
    for directory, _, files in os.walk(rootfs):
        for name in (".", *files):
            os.chown(os.path.join(directory, name), 200000, 200000, follow_symlinks=False)
    script = (
        "cat /proc/self/uid_map; id -u; cut -d' ' -f41 /proc/self/stat; cut -d' ' -f19 /proc/self/stat; ionice; "
        "hostname; cat /proc/sys/kernel/domainname; hostname other && hostname; "
        "cat /proc/sys/kernel/shm_rmid_forced; touch /made"
    )

    def change(document: dict[str, Any]) -> None:
        document["linux"]["namespaces"].append({"type": "user"})
        document["linux"].update(uidMappings=MAPPING, gidMappings=MAPPING, sysctl={"kernel.shm_rmid_forced": "1"})
        document.update(hostname="mine", domainname="example.org", root={"path": str(rootfs)})
        document["process"]["scheduler"] = {"policy": "SCHED_BATCH", "nice": 5}
        document["process"]["ioPriority"] = {"class": "IOPRIO_CLASS_BE", "priority": 6}
        document["process"]["capabilities"]["effective"].append("CAP_SYS_ADMIN")
        document["process"]["capabilities"]["permitted"].append("CAP_SYS_ADMIN")
        document["process"]["capabilities"]["bounding"].append("CAP_SYS_ADMIN")

    bundle = edited(runtime.bundle("one", rootfs, "sh", "-c", script), change)
    done = runtime("run", "--bundle", str(bundle), "one")
    assert done.code == 0, (done, runtime.said())
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[:2] == ["0 200000 65536", "0"]
    assert lines[2:5] == ["3", "5", "best-effort: prio 6"], lines
    assert lines[5:] == ["mine", "example.org", "other", "1"]
    assert (rootfs / "made").stat().st_uid == 200000


def test_devices_sockets_limits_and_hooks_of_a_pod(runtime: Runtime, box_rootfs: Path, disk: str) -> None:
    """Several containers in one machine, since starting one is what costs."""
    ids = {"io.kubernetes.cri.sandbox-id": "pause"}
    sandbox = {"io.kubernetes.cri.container-type": "sandbox", **ids}
    pause = runtime.bundle("pause", box_rootfs, "sleep", "1000", annotations=sandbox)
    pid = runtime.create("pause", pause)
    runtime.ok("start", "pause")
    member = {"io.kubernetes.cri.container-type": "container", **ids}
    status = os.stat(disk)
    numbers = {"major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev)}

    def joined(document: dict[str, Any]) -> None:
        for namespace in document["linux"]["namespaces"]:
            if namespace["type"] in ("network", "ipc"):
                name = {"network": "net"}.get(namespace["type"], namespace["type"])
                namespace["path"] = f"/proc/{pid}/ns/{name}"

    def bundle(name: str, script: str, change: Any) -> Path:
        made = runtime.bundle(name, box_rootfs, "sh", "-c", script, annotations=member)
        return edited(edited(made, joined), change)

    def allowed(access: str) -> list[dict[str, Any]]:
        return [{"allow": False, "access": "rwm"}, {"allow": True, "type": "b", "access": access, **numbers}]

    # A disk under the path, type, mode and owner that were asked for; written as the rules say.
    def with_disk(document: dict[str, Any], access: str = "rwm") -> None:
        entry = {"path": "/dev/data", "type": "b", **numbers, "fileMode": 0o640, "uid": 0, "gid": 8}
        document["linux"]["devices"] = [entry, {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]
        document["linux"]["resources"] = {
            "devices": allowed(access),
            "blockIO": {"throttleWriteBpsDevice": [{**numbers, "rate": 5 * MIB}]},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4 * MIB}],
        }

    script = (
        "stat -c '%F %a %u %g' /dev/data; head -n1 /dev/data; stat -c %t:%T /dev/fuse; "
        "echo second | dd of=/dev/data bs=512 seek=1 conv=sync 2>/dev/null; sync; "
        "cut -d' ' -f2- /sys/fs/cgroup/io.max; cat /sys/fs/cgroup/hugetlb.2MB.max; "
        "d=$(stat -c '%t %T' /dev/data); printf '%d:%d' 0x${d% *} 0x${d#* }; cut -d' ' -f1 /sys/fs/cgroup/io.max"
    )
    made = bundle("one", script, with_disk)
    lines = runtime.ok("run", "--bundle", str(made), "one").splitlines()
    assert lines[:3] == ["block special file 640 0 8", "first", "a:e5"], (lines, runtime.said())
    assert lines[3] == f"rbps=max wbps={5 * MIB} riops=max wiops=max"
    assert lines[4] == str(4 * MIB)
    both = lines[5]
    assert both[: len(both) // 2] == both[len(both) // 2 :], both
    with open(disk, "rb") as file:
        file.seek(512)
        assert file.read(7) == b"second\n"

    # What the guest does not have is said by the name of its field.
    def refusing(document: dict[str, Any], *, resources: Any = None, options: Any = ()) -> None:
        document["linux"]["resources"] = resources or {}
        document["mounts"].append({"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": [*options]})

    refusals: tuple[tuple[dict[str, Any], str], ...] = (
        ({"resources": {"hugepageLimits": [{"pageSize": "3MB", "limit": 3 * MIB}]}}, "names pages of '3MB'"),
        ({"resources": {"unified": {"memory.hihg": "1"}}}, "'linux.resources.unified' names 'memory.hihg'"),
        ({"options": ["size=1m", "colour=red"]}, "tmpfs at '/t': the guest's kernel refuses option 'colour=red'"),
    )
    for number, (change, said) in enumerate(refusals):
        made = bundle(f"refused{number}", "true", partial(refusing, **change))
        assert said in runtime.refused("create", "--bundle", str(made), made.name)

    # Read-only where no rule lets it be written, also as a bind mount; beside it a socket and a common device.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime.scratch / "socket"))
        extra = [
            {"destination": "/node", "type": "bind", "source": disk, "options": ["bind", "ro"]},
            {"destination": "/socket", "type": "bind", "source": str(runtime.scratch / "socket"), "options": ["bind"]},
            {"destination": "/nothing", "type": "bind", "source": "/dev/null", "options": ["bind"]},
        ]

        def bound(document: dict[str, Any]) -> None:
            with_disk(document, "r")
            document["linux"]["resources"].pop("blockIO")
            document["mounts"] += extra
            document["domainname"] = "members.example"
            document["hostname"] = "member"
            document["process"]["scheduler"] = {"policy": "SCHED_FIFO", "priority": 4}
            document["linux"]["namespaces"].append({"type": "time"})
            document["linux"]["timeOffsets"] = {"boottime": {"secs": 2000, "nanosecs": 0}}

        script = (
            "head -n1 /node; echo x 2>/dev/null >/dev/data || echo refused; stat -c %F /socket /nothing; "
            "tail -n1 /proc/self/timens_offsets | tr -s ' '; "
            "cat /proc/sys/kernel/domainname; hostname; cut -d' ' -f40,41 /proc/self/stat; sleep 1000"
        )
        made = bundle("two", script, bound)
        with (runtime.scratch / "out").open("wb") as stdout:
            runtime.create("two", made, stdout=stdout)
            # An exec has its own.
            runtime.ok("start", "two")
        process = {
            "args": ["sh", "-c", "cut -d' ' -f19,41 /proc/self/stat; ionice; umask"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0, "umask": 0o27},
            "scheduler": {"policy": "SCHED_OTHER", "nice": 9, "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
            "ioPriority": {"class": "IOPRIO_CLASS_IDLE"},
        }
        (made / "process.json").write_text(json.dumps(process))
        said = runtime.ok("exec", "--process", str(made / "process.json"), "two").splitlines()
        assert said[1:] == ["idle", "0027"], said
        runtime.ok("delete", "--force", "two")
        lines = (runtime.scratch / "out").read_text().splitlines()
        assert lines[:4] == ["first", "refused", "socket", "character special file"]
        assert lines[4:] == ["boottime 2000 0", "members.example", "member", "4 1"]

    # A hook for the container's namespaces: the pod's network, and mounts that nobody else sees.
    def hooked(document: dict[str, Any]) -> None:
        told = runtime.scratch / "told"
        place = runtime.scratch / "r"
        inside = f"readlink /proc/self/ns/net > {told}; mount -t tmpfs none {place}; cat > /dev/null"
        hook = {"path": "/bin/sh", "args": ["sh", "-c", inside], "env": ["PATH=/usr/bin:/bin:/sbin:/usr/sbin"]}
        document["hooks"] = {"createContainer": [hook]}

    runtime.ok("run", "--bundle", str(bundle("three", "true", hooked)), "three")
    assert (runtime.scratch / "told").read_text().strip() == os.readlink(f"/proc/{pid}/ns/net")
    assert runtime.ok("list", "-q").split() == ["pause"]

    # Quotas of all containers size the machine while it runs, and its cgroup.
    def limited(document: dict[str, Any]) -> None:
        document["linux"]["resources"] = {
            "memory": {"limit": 128 * MIB},
            "cpu": {"quota": 200000, "period": 100000},
            "pids": {"limit": -1},
        }

    def machine() -> tuple[int, int]:
        said = runtime.ok("exec", "sized", "sh", "-c", "nproc; grep MemTotal /proc/meminfo").split()
        return int(said[0]), int(said[2]) // 1024

    runtime.create("sized", bundle("sized", "sleep 1000", limited))
    runtime.ok("start", "sized")
    cpus, memory = machine()
    assert cpus == min(3, len(os.sched_getaffinity(0)))
    runtime.ok("update", "--memory", str(640 * MIB), "--cpu-quota", "50000", "sized")
    assert machine()[1] >= memory + 500
    read = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max"
    assert runtime.ok("exec", "sized", "sh", "-c", read).split() == [str(640 * MIB), "50000", "100000", "max"]
    stats = json.loads(runtime.ok("events", "--stats", "sized"))["data"]
    assert stats["memory"]["usage"]["limit"] == 640 * MIB
    runtime.ok("delete", "--force", "sized")

    # What cannot be had is refused, and the pod goes on.
    refused = {
        "linux.devices[0]": {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232},
        "disk 8:250": {"path": "/dev/none", "type": "b", "major": 8, "minor": 250},
    }
    for number, (words, device) in enumerate(refused.items()):

        def with_device(document: dict[str, Any], device: dict[str, Any] = device) -> None:
            document["linux"]["devices"] = [device]

        made = bundle(f"bad{number}", "true", with_device)
        assert words in runtime.refused("create", "--bundle", str(made), f"bad{number}")
    assert runtime.ok("list", "-q").split() == ["pause"]
