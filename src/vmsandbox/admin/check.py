"""`vmsandbox check`: can this machine run pods, how, and what has to be installed first.

Nothing is changed and nothing is made, so it can be run before anything else and by anybody.  Each finding is about
one thing; one that is missing says which command brings it.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import resource
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vmsandbox.arguments import Parser
from vmsandbox.config import load
from vmsandbox.config.model import Settings
from vmsandbox.errors import NotFoundError, SandboxError
from vmsandbox.guestbuild import packages, tuned
from vmsandbox.guestbuild.choice import chosen
from vmsandbox.guestbuild.store import FLAVOURS
from vmsandbox.resources.network import cni
from vmsandbox.resources.network.bridge import PLUGINS
from vmsandbox_hypervisor.children import SETPRIV, SETPRIV_PACKAGE
from vmsandbox_hypervisor.errors import AccelError
from vmsandbox_hypervisor.qemu import probe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmsandbox.paths import Roots
    from vmsandbox_hypervisor.api import AccelChoice

#: the oldest QEMU that this program is tested with
OLDEST_QEMU = (7, 2)
FIRMWARE = "qboot.rom"
#: seconds a program may take to say its version
VERSION_TIMEOUT = 20.0
#: below this a writable layer or an image soon finds no space
LEAST_DISK_MIB = 1024
LEAST_RUN_MIB = 16
#: fewer files of a share than that are soon known to a guest at once
LEAST_DESCRIPTORS = 100_000
CAP_SYS_RESOURCE = 24

QEMU_PACKAGES = ("qemu-system-x86",)
VIRTIOFSD_PACKAGES = ("qemu-system-common",)

Status = Literal["ok", "warning", "missing"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at; with status ``missing`` no pod can run."""

    name: str
    status: Status
    detail: str
    #: a command or an advice; empty when all is well
    remedy: str = ""
    #: packages that bring what is missing
    packages: tuple[str, ...] = ()


async def _proved(settings: Settings) -> AccelChoice:
    hypervisor = settings.hypervisor
    return await probe.chosen(hypervisor.accel, binary=Path(hypervisor.binary))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the machine is looked at; tests look at one of their own making."""

    dev: Path = Path("/dev")
    proc: Path = Path("/proc")
    search_path: str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    architecture: str = platform.machine()
    uid: int = os.geteuid()
    #: whether this Python has it, with which the guest's libraries are fetched
    pip: bool = find_spec("pip") is not None
    #: open files that a process may have, if nothing lets it raise that
    descriptors: int = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    accel: Callable[[Settings], Any] = _proved

    def installing(self, packages: Sequence[str]) -> str:
        """The command that brings `packages`, if the package manager is one we know."""
        names = " ".join(packages)
        if shutil.which("apt-get", path=self.search_path):
            return f"apt-get install --no-install-recommends {names}"
        return f"install what Debian calls {names}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was found."""

    findings: tuple[Finding, ...]
    accel: AccelChoice | None
    #: one command for all missing packages; empty if there is none to install
    install: str = ""

    @property
    def able(self) -> bool:
        return not any(finding.status == "missing" for finding in self.findings)


def main(argv: Sequence[str], roots: Roots) -> int:
    """Print the report; 0 when a pod can run, 1 otherwise."""
    parser = Parser(prog="vmsandbox check", description="Can this machine run pods?")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args(argv)
    report = asyncio.run(checked(roots, config_file=os.environ.get("VMSANDBOX_CONFIG")))
    print(as_json(report) if options.format == "json" else as_text(report))
    return 0 if report.able else 1


async def checked(
    roots: Roots, *, config_file: str | None = None, machine: Machine | None = None, etc: Path = load.ETC
) -> Report:
    """Look at everything.  Never raises for what is wrong with the machine or the configuration."""
    machine = machine or Machine()
    configuration, settings = _configuration(roots, config_file, etc)
    acceleration, choice = await _acceleration(settings, machine)
    findings = (
        configuration,
        _architecture(machine),
        _root(machine),
        _qemu(settings, machine),
        _virtiofsd(settings, machine),
        _descriptors(machine),
        acceleration,
        _tool(machine, SETPRIV, "no virtual machine can be started", (SETPRIV_PACKAGE,)),
        _guest(settings, roots, machine),
        _tool(machine, "mkfs.erofs", "images cannot be imported", ("erofs-utils",)),
        _tool(machine, "zstd", "images compressed with it cannot be imported", ("zstd",), status="warning"),
        _tool(machine, "mkfs.ext4", "containers get no writable layer", ("e2fsprogs",)),
        _tun(machine),
        _plugins(settings, machine),
        _cgroup(machine),
        _memory(settings, machine),
        _space("run root", roots.run, LEAST_RUN_MIB),
        _space("data root", roots.data, LEAST_DISK_MIB),
    )
    needed = sorted({package for finding in findings for package in finding.packages})
    return Report(findings=findings, accel=choice, install=machine.installing(needed) if needed else "")


def as_text(report: Report) -> str:
    """The report for people: a line for each finding, then what to do."""
    width = max(len(finding.name) for finding in report.findings)
    lines = []
    for finding in report.findings:
        text = finding.detail + (f": {finding.remedy}" if finding.remedy else "")
        lines.append(f"{finding.status:8} {finding.name:{width}}  {text}")
    missing = sum(finding.status == "missing" for finding in report.findings)
    lines.append("")
    if report.able and report.accel is not None:
        how = "hardware virtualisation" if report.accel.accel == "kvm" else "software emulation"
        lines.append(f"this machine can run pods, with {how}: {report.accel.reason}")
    else:
        lines.append(
            f"this machine cannot run pods yet: {missing} {'thing is' if missing == 1 else 'things are'} missing"
        )
    if report.install:
        lines.append(f"to install what is missing: {report.install}")
    return "\n".join(lines)


def as_json(report: Report) -> str:
    """The report for programs: one object."""
    accel = None if report.accel is None else {"accel": report.accel.accel, "reason": report.accel.reason}
    findings = [asdict(finding) for finding in report.findings]
    return json.dumps({"able": report.able, "accel": accel, "install": report.install, "findings": findings}, indent=2)


def _configuration(roots: Roots, config_file: str | None, etc: Path) -> tuple[Finding, Settings]:
    try:
        settings = load.load(roots, config_file=config_file, etc=etc)
        names = ", ".join(f"'{path}'" for path in load.files(config_file, etc=etc))
    except SandboxError as error:
        advice = "correct it; the rest is checked with the defaults"
        return Finding(name="configuration", status="missing", detail=str(error), remedy=advice), Settings()
    return Finding(name="configuration", status="ok", detail=names), settings


def _architecture(machine: Machine) -> Finding:
    if machine.architecture == "x86_64":
        return Finding(name="architecture", status="ok", detail="x86-64")
    detail = f"'{machine.architecture}' is not supported"
    return Finding(name="architecture", status="missing", detail=detail, remedy="use an x86-64 machine")


def _root(machine: Machine) -> Finding:
    if machine.uid == 0:
        return Finding(name="privileges", status="ok", detail="root")
    return Finding(
        name="privileges",
        status="missing",
        detail=f"uid '{machine.uid}' cannot run pods",
        remedy="become root, with sudo",
    )


def _qemu(settings: Settings, machine: Machine) -> Finding:
    binary = Path(settings.hypervisor.binary)
    if not os.access(binary, os.X_OK):
        return _absent("qemu", f"'{binary}' does not exist", QEMU_PACKAGES, machine)
    output = _output([str(binary), "--version"])
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", output)
    if not match:
        detail = f"'{binary}' does not tell its version: {output.strip()[:200] or 'no output'}"
        return _absent("qemu", detail, QEMU_PACKAGES, machine)
    version = match[0].removeprefix("version ")
    if (int(match[1]), int(match[2])) < OLDEST_QEMU:
        oldest = ".".join(map(str, OLDEST_QEMU))
        return _absent("qemu", f"{version} is older than {oldest}", QEMU_PACKAGES, machine)
    directories = [Path(line.strip()) for line in _output([str(binary), "-L", "help"]).splitlines() if line.strip()]
    if not any((directory / FIRMWARE).is_file() for directory in directories):
        return _absent("qemu", f"{version} has no firmware '{FIRMWARE}'", ("qemu-system-data",), machine)
    return Finding(name="qemu", status="ok", detail=f"{version} at '{binary}'")


def _virtiofsd(settings: Settings, machine: Machine) -> Finding:
    binary = settings.hypervisor.virtiofsd
    if settings.sandbox.shared_fs != "virtio-fs":
        return Finding(name="virtiofsd", status="ok", detail=f"not used with shared_fs '{settings.sandbox.shared_fs}'")
    if os.access(binary, os.X_OK):
        return Finding(name="virtiofsd", status="ok", detail=f"'{binary}'")
    detail = f"'{binary}' does not exist: directories cannot be shared by virtio-fs"
    return _absent("virtiofsd", detail, VIRTIOFSD_PACKAGES, machine, status="warning")


def _descriptors(machine: Machine) -> Finding:
    """virtiofsd holds one for each file that the guest knows of, and raises its limit where it is allowed to."""
    try:
        found = re.search(r"^CapEff:\t([0-9a-f]+)$", (machine.proc / "self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found and int(found[1], 16) >> CAP_SYS_RESOURCE & 1:
        return Finding(name="descriptors", status="ok", detail="as many as are needed")
    detail = f"at most {machine.descriptors}, and so many files of a share can be known to a guest at once"
    if machine.descriptors >= LEAST_DESCRIPTORS:
        return Finding(name="descriptors", status="ok", detail=detail)
    remedy = "raise the hard limit of open files ('ulimit -Hn', systemd's 'LimitNOFILE'), or use '--shared-fs 9p'"
    return Finding(name="descriptors", status="warning", detail=detail, remedy=remedy)


async def _acceleration(settings: Settings, machine: Machine) -> tuple[Finding, AccelChoice | None]:
    try:
        choice = await machine.accel(settings)
    except AccelError as error:
        remedy = "set 'hypervisor.accel' to 'auto' for software emulation"
        return Finding(name="acceleration", status="missing", detail=str(error), remedy=remedy), None
    return Finding(name="acceleration", status="ok", detail=f"{choice.accel}: {choice.reason}"), choice


def _guest(settings: Settings, roots: Roots, machine: Machine) -> Finding:
    wanted = settings.guest
    try:
        guest = chosen(roots, wanted.kernel, wanted.image)
    except SandboxError as error:
        detail, _, remedy = str(error).rpartition(": ")
        needed = _for_building(wanted.kernel, machine) if isinstance(error, NotFoundError) else ()
        if needed:
            remedy = f"{machine.installing(needed)}; then {remedy}"
        return Finding(name="guest", status="missing", detail=detail, remedy=remedy, packages=needed)
    return Finding(name="guest", status="ok", detail=f"kernel '{guest.kernel}', image '{guest.image}'")


def _for_building(flavour: str, machine: Machine) -> tuple[str, ...]:
    """The packages that are missing for 'vmsandbox guest build', but for mkfs.erofs, which is a finding of its own."""
    if flavour not in FLAVOURS:
        return ()
    tools = packages.TOOLS | (tuned.TOOLS if flavour == "tuned" else {})
    missing = {
        package
        for tool, package in tools.items()
        if shutil.which(tool, path=machine.search_path) is None and not Path(tool).exists()
    }
    if not machine.pip:
        missing.add("python3-pip")
    return tuple(sorted(missing))


def _tool(
    machine: Machine, program: str, consequence: str, wanted: tuple[str, ...], *, status: Status = "missing"
) -> Finding:
    found = shutil.which(program, path=machine.search_path)
    if found:
        return Finding(name=program, status="ok", detail=f"'{found}'")
    return _absent(program, f"not found: {consequence}", wanted, machine, status=status)


def _tun(machine: Machine) -> Finding:
    if (machine.dev / "net" / "tun").exists():
        return Finding(name="tun", status="ok", detail="available")
    return Finding(
        name="tun",
        status="warning",
        detail=f"'{machine.dev}/net/tun' does not exist: pods get no network interfaces",
        remedy="modprobe tun",
    )


def _plugins(settings: Settings, machine: Machine) -> Finding:
    """The programs of the default network; without them pods run with another one, or with none."""
    without = "only '--network none' and 'ns:PATH' work"
    places = settings.network.plugins.split(":")
    missing = [name for name in PLUGINS if cni.located(name, places) is None]
    if missing:
        detail = f"network plugin '{missing[0]}' is not in {' or '.join(map(repr, places))}: {without}"
        return _absent("network", detail, ("containernetworking-plugins",), machine, status="warning")
    if not shutil.which("iptables", path=machine.search_path):
        detail = f"the network plugins need 'iptables': {without}"
        return _absent("network", detail, ("iptables",), machine, status="warning")
    return Finding(name="network", status="ok", detail="the default network's plugins are there")


def _cgroup(machine: Machine) -> Finding:
    mode = cgroup_mode(machine.proc / "self" / "mounts")
    if mode:
        return Finding(name="cgroup", status="ok", detail=mode)
    return Finding(
        name="cgroup",
        status="warning",
        detail="no cgroup file system is mounted: pods cannot be accounted for on the host",
        remedy="mount -t cgroup2 none /sys/fs/cgroup",
    )


def cgroup_mode(mounts: Path) -> str:
    """``v2``, ``v1`` or ``hybrid`` (controllers on v1, a v2 tree beside them); empty if there is none."""
    kinds = set()
    try:
        text = mounts.read_text(errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        fields = line.split(" ")
        if len(fields) > 2 and fields[1].startswith("/sys/fs/cgroup"):
            kinds.add(fields[2])
    if "cgroup" in kinds:
        return "hybrid" if "cgroup2" in kinds else "v1"
    return "v2" if "cgroup2" in kinds else ""


def _memory(settings: Settings, machine: Machine) -> Finding:
    wanted = settings.sandbox.base_memory_mib + settings.sandbox.default_container_memory_mib
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB", (machine.proc / "meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if not match:
        return Finding(name="memory", status="warning", detail="how much is available is not known")
    available = int(match[1]) // 1024
    detail = f"{available} MiB available, a pod of one container can use {wanted} MiB"
    if available < settings.sandbox.base_memory_mib:
        return Finding(name="memory", status="missing", detail=detail, remedy="end something or add memory")
    if available < wanted:
        remedy = "end something or lower 'sandbox.default_container_memory_mib'"
        return Finding(name="memory", status="warning", detail=detail, remedy=remedy)
    return Finding(name="memory", status="ok", detail=detail)


def _space(name: str, path: Path, least_mib: int) -> Finding:
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        option = "--root" if name == "run root" else "--data-root"
        return Finding(
            name=name, status="missing", detail=f"'{existing}' cannot be written to", remedy=f"choose another {option}"
        )
    status = os.statvfs(existing)
    free = status.f_bavail * status.f_frsize // (1024 * 1024)
    detail = f"'{path}', {free} MiB free"
    if free < least_mib:
        return Finding(name=name, status="warning", detail=detail, remedy=f"free at least {least_mib} MiB")
    return Finding(name=name, status="ok", detail=detail)


def _absent(
    name: str, detail: str, wanted: tuple[str, ...], machine: Machine, *, status: Status = "missing"
) -> Finding:
    return Finding(name=name, status=status, detail=detail, remedy=machine.installing(wanted), packages=wanted)


def _output(command: list[str]) -> str:
    """What a program prints; empty if it cannot be run or does not end."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=VERSION_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")
