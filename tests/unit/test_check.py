"""What `vmsandbox check` finds on machines of the tests' own making."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.guests import broken_image, hanging_kernel
from vmsandbox.admin import check
from vmsandbox.admin.check import Finding, Machine, Report, as_json, as_text, cgroup_mode, checked
from vmsandbox.guestbuild import store
from vmsandbox.paths import Roots
from vmsandbox.resources.network.bridge import PLUGINS
from vmsandbox_hypervisor.api import AccelChoice
from vmsandbox_hypervisor.errors import AccelError

if TYPE_CHECKING:
    from vmsandbox.config.model import Settings

QEMU = """#!/bin/sh
case "$1" in
--version) echo 'QEMU emulator version VERSION (Debian 1:VERSION)' ;;
-L) echo 'FIRMWARE' ;;
esac
"""


async def emulated(settings: Settings) -> AccelChoice:
    return AccelChoice(accel="tcg", reason="KVM does not work here: because")


async def refused(settings: Settings) -> AccelChoice:
    raise AccelError("KVM was asked for, but it does not work here: because")


class Bench:
    """A machine on which everything is there, for tests to take something away."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.roots = Roots(root / "run", root / "data")
        self.etc = root / "etc"
        self.etc.mkdir()
        self.bin = root / "bin"
        self.bin.mkdir()
        (root / "firmware").mkdir()
        (root / "firmware" / "qboot.rom").touch()
        self.qemu()
        for program in (
            *("virtiofsd", "mkfs.erofs", "mkfs.ext4", "iptables", "setpriv", "zstd", *PLUGINS),
            *("apt-get", "apt-cache", "dpkg-deb"),
        ):
            self.program(program, "#!/bin/sh\n")
        for path, text in (
            ("proc/meminfo", "MemTotal: 4000000 kB\nMemAvailable: 2000000 kB\n"),
            ("proc/self/status", "CapEff:\t000001ffffffffff\n"),
            ("proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"),
            ("dev/net/tun", ""),
        ):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        self.configure()
        self.build_guest()
        self.machine = Machine(
            dev=root / "dev",
            proc=root / "proc",
            search_path=str(self.bin),
            architecture="x86_64",
            uid=0,
            accel=emulated,
        )

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def qemu(self, version: str = "7.2.22", text: str = QEMU) -> None:
        content = text.replace("VERSION", version).replace("FIRMWARE", str(self.root / "firmware"))
        self.program("qemu-system-x86_64", content)

    def configure(self, text: str = "") -> None:
        hypervisor = f"[hypervisor]\nbinary = '{self.bin}/qemu-system-x86_64'\nvirtiofsd = '{self.bin}/virtiofsd'\n"
        network = f"[network]\nplugins = '{self.bin}'\n"
        (self.etc / "config.toml").write_text(hypervisor + network + text)

    def build_guest(self) -> None:
        with store.staging(self.roots.guests / ("0" * 32)) as directory:
            for name in ("vmlinux", "root.erofs"):
                (directory / name).write_text("x")
            files = {"kernel": "vmlinux", "image": "root.erofs"}
            store.write_manifest(directory, flavour="packaged", files=files, cmdline=[])
        store.select(self.roots, "packaged", "0" * 32)

    async def report(self, **changes: object) -> Report:
        machine = replace(self.machine, **changes)  # type: ignore[arg-type]
        return await checked(self.roots, machine=machine, etc=self.etc)

    async def finding(self, name: str, **changes: object) -> Finding:
        report = await self.report(**changes)
        return next(finding for finding in report.findings if finding.name == name)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_a_complete_machine_can_run_pods(bench: Bench) -> None:
    report = await bench.report()
    assert [finding for finding in report.findings if finding.status != "ok"] == []
    assert report.able
    assert as_text(report).endswith(
        "\nthis machine can run pods, with software emulation: KVM does not work here: because"
    )


async def test_looking_changes_nothing(bench: Bench) -> None:
    before = sorted(bench.root.rglob("*"))
    await bench.report()
    assert sorted(bench.root.rglob("*")) == before


@pytest.mark.parametrize(
    ("program", "name", "package"),
    [
        ("qemu-system-x86_64", "qemu", "qemu-system-x86"),
        ("mkfs.erofs", "mkfs.erofs", "erofs-utils"),
        ("mkfs.ext4", "mkfs.ext4", "e2fsprogs"),
        ("setpriv", "setpriv", "util-linux"),
    ],
)
async def test_a_missing_program_is_named_with_the_command_that_installs_it(
    bench: Bench, program: str, name: str, package: str
) -> None:
    (bench.bin / program).unlink()
    report = await bench.report()
    (finding,) = [finding for finding in report.findings if finding.status != "ok"]
    assert (finding.name, finding.status) == (name, "missing")
    assert finding.remedy == f"apt-get install --no-install-recommends {package}"
    assert not report.able
    assert "this machine cannot run pods yet: 1 thing is missing" in as_text(report)


async def test_one_command_installs_everything(bench: Bench) -> None:
    for program in ("qemu-system-x86_64", "mkfs.erofs", "virtiofsd"):
        (bench.bin / program).unlink()
    report = await bench.report()
    assert report.install == ("apt-get install --no-install-recommends erofs-utils qemu-system-common qemu-system-x86")
    assert as_text(report).endswith(f"to install what is missing: {report.install}")


async def test_without_apt_the_packages_are_named(bench: Bench) -> None:
    (bench.bin / "apt-get").unlink()
    (bench.bin / "mkfs.erofs").unlink()
    assert (await bench.finding("mkfs.erofs")).remedy == "install what Debian calls erofs-utils"


async def test_without_virtiofsd_pods_run_but_cannot_share(bench: Bench) -> None:
    (bench.bin / "virtiofsd").unlink()
    report = await bench.report()
    assert report.able
    assert (await bench.finding("virtiofsd")).status == "warning"
    bench.configure("[sandbox]\nshared_fs = '9p'\n")
    assert (await bench.finding("virtiofsd")).status == "ok"


@pytest.mark.parametrize(
    ("version", "detail"),
    [("6.2.0", "6.2.0 is older than 7.2"), ("nonsense", "does not tell its version: QEMU emulator version nonsense")],
)
async def test_an_unusable_qemu_is_explained(bench: Bench, version: str, detail: str) -> None:
    bench.qemu(version)
    finding = await bench.finding("qemu")
    assert finding.status == "missing"
    assert detail in finding.detail


async def test_a_qemu_that_cannot_be_executed_is_explained(bench: Bench) -> None:
    bench.program("qemu-system-x86_64", "\0\0")
    assert (await bench.finding("qemu")).detail.endswith("does not tell its version: no output")


async def test_a_missing_firmware_is_named(bench: Bench) -> None:
    (bench.root / "firmware" / "qboot.rom").unlink()
    assert (await bench.finding("qemu")).detail == "7.2.22 has no firmware 'qboot.rom'"


async def test_an_acceleration_that_does_not_work_is_explained(bench: Bench) -> None:
    report = await bench.report(accel=refused)
    assert not report.able
    assert report.accel is None
    finding = await bench.finding("acceleration", accel=refused)
    assert finding.detail == "KVM was asked for, but it does not work here: because"
    assert "'auto'" in finding.remedy


async def test_a_guest_that_was_not_built_is_named_with_the_command_that_builds_it(bench: Bench) -> None:
    store.remove(bench.roots, "0" * 32)
    finding = await bench.finding("guest")
    assert (finding.status, finding.remedy) == ("missing", "run 'vmsandbox guest build'")
    assert "no guest with the 'packaged' kernel has been built" in finding.detail


async def test_with_a_guest_that_was_not_built_what_building_runs_is_named(bench: Bench) -> None:
    for program in ("apt-cache", "dpkg-deb"):
        (bench.bin / program).unlink()
    assert (await bench.finding("guest")).status == "ok", "what is built needs none of it"
    store.remove(bench.roots, "0" * 32)
    finding = await bench.finding("guest", pip=False)
    assert finding.packages == ("apt", "dpkg", "python3-pip")
    install = "apt-get install --no-install-recommends apt dpkg python3-pip"
    assert finding.remedy == f"{install}; then run 'vmsandbox guest build'"


async def test_without_zstd_some_images_cannot_be_imported(bench: Bench) -> None:
    (bench.bin / "zstd").unlink()
    report = await bench.report()
    (finding,) = [finding for finding in report.findings if finding.status != "ok"]
    assert (finding.name, finding.status, finding.packages) == ("zstd", "warning", ("zstd",))
    assert report.able


async def test_a_guest_of_ones_own_needs_no_built_one(bench: Bench) -> None:
    store.remove(bench.roots, "0" * 32)
    kernel, image = hanging_kernel(bench.root / "mine"), bench.root / "image"
    bench.configure(f"[guest]\nkernel = '{kernel}'\nimage = '{image}'\n")
    missing = await bench.finding("guest")
    assert (missing.status, missing.detail) == (
        "missing", f"cannot open '{image}' ('guest.image'): no such file or directory"
    )  # fmt: skip
    image.write_bytes(bytes(4096))
    assert (await bench.finding("guest")).detail == f"'{image}' ('guest.image') is no erofs"
    broken_image(image)
    assert (await bench.finding("guest")).detail == f"kernel '{kernel}', image '{image}'"


async def test_without_its_plugins_there_is_no_default_network(bench: Bench) -> None:
    for program, package in (("portmap", "containernetworking-plugins"), ("iptables", "iptables")):
        (bench.bin / program).unlink()
        finding = await bench.finding("network")
        assert (finding.status, finding.packages) == ("warning", (package,))
        assert f"'{program}'" in finding.detail
        bench.program(program, "")
    assert (await bench.finding("network")).status == "ok"


async def test_a_bad_configuration_is_a_finding_and_the_rest_is_checked(bench: Bench) -> None:
    usual = [finding.name for finding in (await bench.report()).findings]
    bench.configure("[sandbox]\nbase_cpuz = 1\n")
    report = await bench.report()
    assert report.findings[0].status == "missing"
    assert "did you mean 'sandbox.base_cpus'" in report.findings[0].detail
    assert [finding.name for finding in report.findings] == usual


@pytest.mark.parametrize(
    ("changes", "name", "status"),
    [
        ({"architecture": "aarch64"}, "architecture", "missing"),
        ({"uid": 1000}, "privileges", "missing"),
        ({"dev": Path("/nonexistent")}, "tun", "warning"),
        ({"proc": Path("/nonexistent")}, "memory", "warning"),
        ({"proc": Path("/nonexistent")}, "cgroup", "warning"),
    ],
)
async def test_what_the_machine_lacks_is_found(
    bench: Bench, changes: dict[str, object], name: str, status: str
) -> None:
    finding = await bench.finding(name, **changes)
    assert finding.status == status
    assert name == "memory" or finding.remedy


@pytest.mark.parametrize(
    ("capabilities", "limit", "status"),
    [("000001ffffffffff", 1024, "ok"), ("000001fffeffffff", 20_000, "warning"), ("0", 1 << 20, "ok")],
)
async def test_a_low_limit_of_descriptors_that_cannot_be_raised_is_found(
    bench: Bench, capabilities: str, limit: int, status: str
) -> None:
    (bench.root / "proc/self/status").write_text(f"Name:\tx\nCapEff:\t{capabilities}\nSeccomp:\t0\n")
    finding = await bench.finding("descriptors", descriptors=limit)
    assert (finding.status, bool(finding.remedy)) == (status, status == "warning")
    assert (str(limit) in finding.detail) is (capabilities != "000001ffffffffff")


@pytest.mark.parametrize(("available_kib", "status"), [(2_000_000, "ok"), (500_000, "warning"), (100_000, "missing")])
async def test_memory_is_compared_with_what_a_pod_needs(bench: Bench, available_kib: int, status: str) -> None:
    (bench.root / "proc" / "meminfo").write_text(f"MemAvailable: {available_kib} kB\n")
    assert (await bench.finding("memory")).status == status


async def test_a_root_that_cannot_be_a_directory_is_found(bench: Bench) -> None:
    (bench.root / "file").touch()
    bench.roots = Roots(bench.root / "file" / "run", bench.root / "data")
    finding = await bench.finding("run root")
    assert (finding.status, finding.remedy) == ("missing", "choose another --root")


@pytest.mark.parametrize(
    ("mounts", "mode"),
    [
        ("none /sys/fs/cgroup cgroup2 rw 0 0\n", "v2"),
        ("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n", "v1"),
        ("cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n", "hybrid"),
        ("cgroup2 /mnt cgroup2 rw 0 0\nbroken\n", ""),
    ],
)
def test_cgroup_modes(tmp_path: Path, mounts: str, mode: str) -> None:
    path = tmp_path / "mounts"
    path.write_text(mounts)
    assert cgroup_mode(path) == mode


async def test_the_report_for_programs_is_one_object(bench: Bench) -> None:
    (bench.bin / "mkfs.erofs").unlink()
    document = json.loads(as_json(await bench.report()))
    assert document["able"] is False
    assert document["accel"] == {"accel": "tcg", "reason": "KVM does not work here: because"}
    (finding,) = [finding for finding in document["findings"] if finding["name"] == "mkfs.erofs"]
    assert finding["status"] == "missing"


def test_the_verb_tells_by_its_status_whether_pods_can_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On this very machine, but without a guest."""
    monkeypatch.delenv("VMSANDBOX_CONFIG", raising=False)
    empty = Roots(bench.root / "r", bench.root / "d")
    assert check.main(["--format", "json"], empty) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["accel"]["accel"] in ("kvm", "tcg")
    assert check.main([], empty) == 1
    assert "missing  guest" in capsys.readouterr().out
