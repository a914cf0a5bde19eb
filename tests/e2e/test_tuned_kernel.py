"""The tuned kernel is built from its source, and has all that pods and containers need of a kernel.

Compiling takes a quarter of an hour of CPU time: run with ``-m long``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.boxes import make_rootfs
from tests.harness.cli import Cli
from tests.harness.netns import namespace
from tests.harness.roots import BUILT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.long

#: seconds for what takes minutes on an idle machine
PATIENCE = 7200.0
MOUNTED_BY_CONTAINERS = ("overlay", "erofs", "ext4", "xfs", "tmpfs", "9p", "virtiofs", "fuse", "mqueue", "cgroup2")


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    """A data root where the tuned kernel has been built, a template is ready and the image `box` imported."""
    directory = Path(tempfile.mkdtemp(prefix="vmsandbox-data-"))
    if (BUILT / "guest" / "cache").exists():
        (directory / "guest").mkdir()
        shutil.copytree(BUILT / "guest" / "cache", directory / "guest" / "cache")
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        cli = configured(Path(scratch), directory, 'kernel = "tuned"')
        cli.ok("guest", "build", "--kernel", "tuned", timeout=PATIENCE)
        cli.ok("template", "build", timeout=300)
        cli.ok("image", "import", f"rootfs:{make_rootfs(Path(scratch, 'rootfs'))}", "--name", "box")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def tuned(built: Path) -> Iterator[Cli]:
    """The command where pods boot the tuned kernel; nothing may be left by it."""
    with tempfile.TemporaryDirectory(prefix="vs-") as scratch:
        cli = configured(Path(scratch), built, 'kernel = "tuned"')
        yield cli
        cli.remove_all()
        assert cli.leftovers() == []


def configured(run_root: Path, data_root: Path, settings: str) -> Cli:
    cli = Cli(run_root, data_root)
    cli.config = run_root / "config.toml"
    cli.config.write_text(f"[guest]\n{settings}\n[sandbox]\nforks = false\n")
    return cli


def facts(cli: Cli) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cli.ok("guest", "inspect", "--kernel", "tuned", "--format", "json"))
    return found


@pytest.mark.parametrize("template", ["off", "require"])
def test_pods_boot_the_kernel_that_was_built(tuned: Cli, template: str) -> None:
    release = tuned.ok("run", "--rm", f"--template={template}", "box", "uname", "-r")
    assert release.strip() == facts(tuned)["release"]
    assert release.strip().endswith("-vmsandbox")


def test_it_boots_as_a_kernel_of_ones_own_too(tuned: Cli) -> None:
    assert tuned.config is not None
    files = facts(tuned)
    tuned.config.write_text(f"[guest]\nkernel = '{files['kernel']['path']}'\nimage = '{files['image']['path']}'\n")
    assert tuned.ok("run", "--rm", "--template=off", "box", "uname", "-r").strip().endswith("-vmsandbox")


@pytest.mark.parametrize("template", ["off", "require"])
def test_processors_and_memory_are_plugged_in(tuned: Cli, template: str) -> None:
    script = "nproc; grep MemTotal /proc/meminfo; head -c 300m /dev/zero > /dev/shm/x && echo written"
    sizes = ("--cpus", "2", "--memory", "512m", "--shm-size", "400m")
    cpus, total, written = tuned.ok(
        "run", "--rm", f"--template={template}", *sizes, "box", "sh", "-c", script
    ).splitlines()
    assert (cpus, written) == ("2", "written")
    assert int(total.split()[1]) > 512 * 1024


@pytest.mark.parametrize("shared_fs", ["virtio-fs", "9p"])
def test_directories_of_the_host_are_shared(tuned: Cli, shared_fs: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from the host\n")
    script = "cat /data/file; mount | grep -c ' /data '; echo back > /data/answer"
    output = tuned.ok("run", "--rm", "--shared-fs", shared_fs, "-v", f"{tmp_path}:/data", "box", "sh", "-c", script)
    assert output == "from the host\n1\n"
    assert (tmp_path / "answer").read_text() == "back\n"


def test_containers_have_file_systems_control_groups_and_filters(tuned: Cli) -> None:
    script = """
        awk '{print $NF}' /proc/filesystems | sort -u | tr '\\n' ' '; echo
        cat /sys/fs/cgroup/cgroup.controllers
        grep Seccomp: /proc/self/status
        awk '$2 == "/" {print $3}' /proc/mounts
        echo x > /kept; sync; cat /kept
        ls /proc/self/ns | tr '\\n' ' '; echo
        unshare -Ur id -u
        iptables -V >/dev/null 2>&1; modprobe nothing 2>/dev/null || echo no modules
        ls /dev/mem /proc/kcore 2>/dev/null | wc -l
    """
    options = ("--cap-add", "SYS_ADMIN", "--memory", "64m", "--pids-limit", "50")
    lines = tuned.ok("run", "--rm", *options, "box", "sh", "-c", script).splitlines()
    assert set(MOUNTED_BY_CONTAINERS) <= set(lines[0].split())
    assert {"cpu", "cpuset", "io", "memory", "pids"} <= set(lines[1].split())
    assert lines[2].split() == ["Seccomp:", "2"]
    assert lines[3:5] == ["overlay", "x"]
    assert {"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"} <= set(lines[5].split())
    assert lines[6:] == ["0", "no modules", "0"]


def test_interfaces_reach_their_neighbours_over_both_protocols(tuned: Cli) -> None:
    with namespace("vmstest-tuned") as pod, namespace("vmstest-tuned-peer") as peer:
        pod.run(
            f"ip link add eth0 type veth peer name peer0 netns {peer.name}",
            "ip addr add 10.9.0.2/24 dev eth0",
            "ip addr add fd09::2/64 dev eth0 nodad",
            "ip link set eth0 up",
        )
        peer.run(
            "ip addr add 10.9.0.1/24 dev peer0",
            "ip addr add fd09::1/64 dev peer0 nodad",
            "ip link set peer0 up",
        )
        pod.settle("eth0")
        script = "ping -c1 -W20 10.9.0.1 >/dev/null && echo four; ping -6 -c1 -W20 fd09::1 >/dev/null && echo six"
        assert tuned.ok("run", "--rm", "--network", f"ns:{pod.path}", "box", "sh", "-c", script) == "four\nsix\n"
