"""Random config.json files, crun on this machine as what they are compared with, and a program that tells what it sees.

`documents` makes specs that crun accepts and that do not depend on the machine; `damaged` breaks such a one in one
place.  Both runtimes get the same file, but for the namespaces that members of a pod join.
"""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
from hypothesis import strategies as st

from tests.harness.boxes import make_rootfs
from tests.harness.cli import Result
from vmsandbox.cli.runtime.static import default_spec

if TYPE_CHECKING:
    from pathlib import Path

#: seconds until the namespace that crun works in is there, and for one container of it
START_TIMEOUT, TIMEOUT = 30.0, 60.0

#: What a container tells of itself, one `name|value` a line.  Its arguments are places to look at.  Nearly all of it is
#: one process: under emulation each costs as much as the rest.
PROBE = r"""
function say(name, value) { gsub(/[ \t]+/, " ", value); sub(/ $/, "", value); print name "|" value }
function first(path,   line) { line = ""; getline line < path; close(path); return line }
BEGIN {
  while ((getline line < "/proc/self/status") > 0)
    if (match(line, /^(Uid|Gid|Groups|Umask|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp):/))
      say(substr(line, 1, RLENGTH - 1), substr(line, RLENGTH + 2))
  for (name in ENVIRON) say("env " name, ENVIRON[name])
  for (number = 1; number < ARGC; number++) say("argument " number, ARGV[number])
  split("hostname domainname shmmni msgmax shm_rmid_forced", names, " ")
  for (number in names) say("kernel " names[number], first("/proc/sys/kernel/" names[number]))
  split("core/somaxconn ipv4/ip_unprivileged_port_start", names, " ")
  for (number in names) say("net " names[number], first("/proc/sys/net/" names[number]))
  split("uid_map gid_map", names, " ")
  for (number in names) say(names[number], first("/proc/self/" names[number]))
  say("oom_score_adj", first("/proc/self/oom_score_adj"))
  say("personality", first("/proc/self/personality"))
  while ((getline line < "/proc/self/timens_offsets") > 0) say("clock", line)
  say("uptime", first("/proc/uptime"))
  while ((getline line < "/proc/self/limits") > 0) say("limit " substr(line, 1, 26), substr(line, 27, 42))
  while ((getline line < "/proc/self/mountinfo") > 0) {
    count = split(line, field, " ")
    for (dash = 7; field[dash] != "-"; dash++) if (field[dash] != "") say("peer " field[5], substr(field[dash], 1, 6))
    say("mount " field[5], field[6]); say("type " field[5], field[dash + 1])
    if (match(field[count], /size=[^,]*/)) say("size " field[5], substr(field[count], RSTART, RLENGTH))
  }
  split("/etc/passwd /etc/group /proc/sys/kernel/ostype", names, " ")
  for (number in names) say("content " names[number], first(names[number]))
  command = "readlink /proc/self/cwd; ls -A /home /var/empty 2>&1; "
  command = command "for place in /tmp /home /var/empty; do "
  command = command "true > $place/written && echo $place; rm -f $place/written; done; "
  command = command "ls -ln /dev | grep ^[cp]; mkdir /tmp/made 2>&1; rm -rf /tmp/made"
  for (number = 1; number < ARGC; number++) command = command "; ls -ld " ARGV[number] " 2>&1 | cut -c1-10"
  while (("{ " command "; } 2>/dev/null" | getline line) > 0) {
    sub(/ [A-Z][a-z][a-z] +[0-9]+ +[0-9:]+/, "", line)
    say("line", line)
  }
  split("memory.max pids.max cpu.max memory.high hugetlb.2MB.max", names, " ")
  for (number in names) say("cgroup " names[number], first("/sys/fs/cgroup/" names[number]))
}
"""

CAPABILITIES = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD", "CAP_NET_ADMIN"),
    *("CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN"),
    *("CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BPF"),
)
LIMITS = {
    "RLIMIT_NOFILE": (64, 10000),
    "RLIMIT_CORE": (0, 1 << 30),
    "RLIMIT_FSIZE": (1 << 20, 1 << 40),
    "RLIMIT_CPU": (60, 100000),
    "RLIMIT_STACK": (1 << 20, 1 << 30),
    "RLIMIT_MEMLOCK": (0, 1 << 22),
    "RLIMIT_NPROC": (1000, 10000),
    "RLIMIT_SIGPENDING": (100, 1000),
    "RLIMIT_LOCKS": (10, 1000),
}
MASKED = ("/etc/passwd", "/home", "/proc/self/comm", "/no/such")
READ_ONLY = ("/tmp", "/home", "/var/empty", "/etc/group", "/no/such")
PROPAGATION = ("private", "rprivate", "slave", "rslave", "shared", "rshared")
ATTRIBUTES = (
    *("nosuid", "nodev", "noexec", "ro", "rw", "noatime", "relatime", "nodiratime", "strictatime", "sync"),
    # With all that is mounted below; crun takes these for directories only.
    *("rro", "rnosuid", "rnodev", "rnoexec"),
)
#: settings of a network that a pod has, and its members may repeat
NETWORK = {"net.core.somaxconn": "333", "net/ipv4/ip_unprivileged_port_start": "81"}
#: a user namespace in which everybody is who they are; ids of the root file system need no change
MAPPING = [{"containerID": 0, "hostID": 0, "size": 5_000_000}]
#: what hooks of the host write, below the shared directory
HOOKS_LOG = "hooks"
#: hooks of the host
HOOKS = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")

#: what starts crun in a time namespace of its own, which crun 1.8 itself loses its child in; $1 are the offsets
CLOCKS = (
    "import ctypes, pathlib, subprocess, sys; failed = ctypes.CDLL(None).unshare(0x80); "
    "pathlib.Path('/proc/self/timens_offsets').write_text(sys.argv[1]); "
    "sys.exit(failed or subprocess.call(sys.argv[2:]))"
)

names = st.text(alphabet="abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=12)


@st.composite
def processes(draw: st.DrawFn) -> dict[str, Any]:
    """A process object without its arguments."""
    bounding = draw(st.lists(st.sampled_from(CAPABILITIES), unique=True))
    permitted = draw(st.lists(st.sampled_from(bounding), unique=True)) if bounding else []
    some = st.lists(st.sampled_from(permitted), unique=True) if permitted else st.just([])
    inheritable = draw(some)
    ambient = [each for each in draw(some) if each in inheritable]
    uid = draw(st.sampled_from((0, 0, 1000, 65534, 4000000)))
    made: dict[str, Any] = {
        "user": {"uid": uid, "gid": draw(st.sampled_from((0, 1000, 70000)))},
        "cwd": draw(st.sampled_from(("/", "/tmp", "/var/empty", "/made/by/runtime"))),
        "env": ["PATH=/bin", *(f"{name.upper()}={value}" for name, value in draw(environments).items())],
        "capabilities": {
            "bounding": bounding,
            "effective": draw(some),
            "permitted": permitted,
            "inheritable": inheritable,
            "ambient": ambient,
        },
        "noNewPrivileges": draw(st.booleans()),
    }
    if draw(st.booleans()):
        made["user"]["additionalGids"] = draw(st.lists(st.integers(0, 80000), max_size=5, unique=True))
    if draw(st.booleans()):
        made["user"]["umask"] = draw(st.integers(0, 0o777))
    if draw(st.booleans()):
        made["oomScoreAdj"] = draw(st.integers(0, 1000))
    made["rlimits"] = []
    for name in draw(st.lists(st.sampled_from(sorted(LIMITS)), unique=True, max_size=4)):
        low, high = LIMITS[name]
        hard = draw(st.integers(low, high))
        made["rlimits"].append({"type": name, "hard": hard, "soft": draw(st.integers(low, hard))})
    return made


environments = st.dictionaries(
    names.filter(lambda name: not name[0].isdigit() and name != "path"),
    st.text(alphabet="abc =:'\"$é\\", max_size=20).filter(lambda text: text == text.strip() and "\\" not in text),
    max_size=4,
)


@st.composite
def documents(
    draw: st.DrawFn, *, shared: Path, args: tuple[str, ...] = ("awk", "-f", "/probe"), guests_own: bool = True
) -> dict[str, Any]:
    """A whole config.json; `shared` is a directory of the host with a file, a directory and a socket.

    With `guests_own` there may be members that crun does not take everywhere, see `for_control`.
    """
    spec = copy.deepcopy(default_spec())
    spec["ociVersion"] = draw(st.sampled_from(("1.0.0", "1.0.2", "1.0.2-dev")))
    spec["process"] = {**draw(processes()), "args": [*args], "terminal": False}
    spec["root"] = {"path": "rootfs", "readonly": draw(st.booleans())}
    spec["hostname"] = draw(names)
    if draw(st.booleans()):
        spec["domainname"] = draw(names)
    linux = spec["linux"]
    linux["maskedPaths"] = draw(st.lists(st.sampled_from(MASKED), unique=True))
    linux["readonlyPaths"] = draw(st.lists(st.sampled_from(READ_ONLY), unique=True))
    if draw(st.booleans()):
        linux["rootfsPropagation"] = draw(st.sampled_from(PROPAGATION))
    if draw(st.integers(0, 3)) == 0:
        linux["personality"] = {"domain": draw(st.sampled_from(("LINUX", "LINUX32")))}
    linux["sysctl"] = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "kernel.shmmni": st.integers(100, 4000).map(str),
                "kernel.msgmax": st.integers(1000, 8000).map(str),
                "kernel/shm_rmid_forced": st.sampled_from(("0", "1")),
                **{name: st.just(value) for name, value in NETWORK.items()},
            },
        )
    )
    linux["resources"] = draw(resources(guests_own=guests_own))
    _mounts(draw, spec, shared)
    _devices(draw, spec)
    _hooks(draw, spec, shared)
    if draw(st.integers(0, 3)) == 0:
        linux["namespaces"].append({"type": "user"})
        # Copies: what is made of it may be damaged on purpose.
        linux.update(uidMappings=copy.deepcopy(MAPPING), gidMappings=copy.deepcopy(MAPPING))
    elif draw(st.integers(0, 2)) == 0:
        _clocks(draw, linux)
    if draw(st.integers(0, 2)) == 0:
        linux["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                {
                    "names": ["mkdir", "mkdirat"],
                    "action": "SCMP_ACT_ERRNO",
                    "errnoRet": draw(st.sampled_from((1, 28, 95))),
                }
            ],
        }
    return spec


@st.composite
def resources(draw: st.DrawFn, *, guests_own: bool) -> dict[str, Any]:
    """Limits of such a size that the probe can run."""
    made: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}]}
    if draw(st.booleans()):
        made["memory"] = {"limit": draw(st.integers(32, 256)) << 20}
    if draw(st.booleans()):
        made["pids"] = {"limit": draw(st.integers(50, 5000))}
    if guests_own and draw(st.integers(0, 2)) == 0:
        made["unified"] = {"memory.high": str(draw(st.integers(32, 256)) << 20)}
    if guests_own and draw(st.integers(0, 2)) == 0:
        made["hugepageLimits"] = [{"pageSize": "2MB", "limit": draw(st.integers(0, 8)) << 21}]
    if draw(st.booleans()):
        made["cpu"] = {"shares": draw(st.integers(2, 4096))}
        if draw(st.booleans()):
            made["cpu"].update(quota=draw(st.integers(50, 200)) * 1000, period=100000)
    return made


def _clocks(draw: st.DrawFn, linux: dict[str, Any]) -> None:
    """A time namespace; what a clock shows must not be before its machine's start."""
    linux["namespaces"].append({"type": "time"})
    offset = st.fixed_dictionaries(
        {}, optional={"secs": st.integers(-1, 10**6), "nanosecs": st.integers(0, 999_999_999)}
    )
    if draw(st.integers(0, 3)):
        linux["timeOffsets"] = draw(st.fixed_dictionaries({}, optional={"monotonic": offset, "boottime": offset}))


def _mounts(draw: st.DrawFn, spec: dict[str, Any], shared: Path) -> None:
    # What the control groups look like is the machine's.
    spec["mounts"] = [mount for mount in spec["mounts"] if mount["type"] != "cgroup"]
    attributes = st.lists(st.sampled_from(ATTRIBUTES), max_size=4, unique=True)
    for number in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(("directory", "file", "socket", "tmpfs", "null")))
        options = _consistent(draw(attributes))
        if kind not in ("directory", "tmpfs"):
            options = [option for option in options if option not in ATTRIBUTES[-4:]]
        if draw(st.booleans()):
            options.append(draw(st.sampled_from(PROPAGATION)))
        mount: dict[str, Any] = {"destination": f"/mnt{number}/{kind}", "options": options}
        if kind == "tmpfs":
            mount.update(type="tmpfs", source="tmpfs")
            options += [f"size={draw(st.integers(64, 4096))}k", f"mode={draw(st.sampled_from(('755', '1777', '700')))}"]
        else:
            mount.update(type="bind", source="/dev/null" if kind == "null" else str(shared / kind))
            options.append(draw(st.sampled_from(("bind", "rbind"))))
        spec["mounts"].append(mount)
        spec["process"]["args"].append(mount["destination"])


def _consistent(options: list[str]) -> list[str]:
    """Of options that contradict each other the first, since kernels differ in what they make of several."""
    for group in (("ro", "rw", "rro"), ("noatime", "relatime", "strictatime")):
        found = [option for option in options if option in group]
        options = [option for option in options if option not in found[1:]]
    return options


def _devices(draw: st.DrawFn, spec: dict[str, Any]) -> None:
    spec["linux"]["devices"] = []
    for number, (kind, major, minor) in enumerate(
        draw(st.lists(st.sampled_from((("c", 1, 3), ("c", 1, 5), ("c", 10, 229), ("p", 0, 0))), max_size=3))
    ):
        device: dict[str, Any] = {"path": f"/dev/made{number}", "type": kind}
        if kind == "c":
            device.update(major=major, minor=minor)
        device.update(fileMode=draw(st.sampled_from((0o600, 0o666, 0o644))), uid=draw(st.integers(0, 9)), gid=3)
        spec["linux"]["devices"].append(device)


def _hooks(draw: st.DrawFn, spec: dict[str, Any], shared: Path) -> None:
    """Hooks that write down that they were called, and one in the container, which makes a pipe where its user may."""
    chosen = draw(st.lists(st.sampled_from((*HOOKS, "startContainer")), unique=True, max_size=3))
    if chosen:
        spec["hooks"] = {}
    for name in chosen:
        script = (
            "cat > /dev/null; mkfifo /dev/hooked; true"
            if name == "startContainer"
            else f"cat > /dev/null; echo {name} $0 $A >> {shared}/{HOOKS_LOG}"
        )
        hook = {"path": "/bin/sh", "args": ["sh", "-c", script, draw(names)], "env": ["PATH=/bin", "A=a b"]}
        spec["hooks"][name] = [hook] * draw(st.integers(1, 1 if name == "startContainer" else 2))


# ---------------------------------------------------------------- damage


def places(value: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every member and entry of a document, by its way from the top."""
    found = [where] if where else []
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*where, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += places(item, (*where, index))
    return found


@st.composite
def damaged(draw: st.DrawFn, *, shared: Path) -> tuple[bytes, str]:
    """The text of a config.json with one defect, and what that is."""
    spec = draw(documents(shared=shared, args=("true",), guests_own=False))
    if draw(st.integers(0, 9)) == 0:
        text = json.dumps(spec).encode()
        cut = draw(st.integers(1, len(text) - 1))
        return text[:cut], f"cut after {cut} bytes"
    where = draw(st.sampled_from(places(spec)))
    inside = spec
    for key in where[:-1]:
        inside = inside[key]
    junk = draw(st.sampled_from(("", "junk", -1, 2**70, 1.5, True, None, [], {}, ["x"], {"x": 1}, "relative/path")))
    name = ".".join(map(str, where))
    if draw(st.booleans()):
        del inside[where[-1]]
        return json.dumps(spec).encode(), f"without {name}"
    inside[where[-1]] = junk
    return json.dumps(spec).encode(), f"{name} = {junk!r}"


# ---------------------------------------------------------------- crun


def for_control(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec without what crun needs control groups of version 2, or huge pages, for, and without a time namespace."""
    spec = without_clocks(copy.deepcopy(spec))
    for name in ("unified", "hugepageLimits"):
        spec["linux"]["resources"].pop(name, None)
    return spec


def without_clocks(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec without its time namespace, so that crun ignores the offsets."""
    linux = spec.get("linux")
    namespaces = linux.get("namespaces") if isinstance(linux, dict) else None
    if isinstance(linux, dict) and isinstance(namespaces, list):
        linux["namespaces"] = [each for each in namespaces if each != {"type": "time"}]
    return spec


def clocks(spec: dict[str, Any]) -> str | None:
    """The offsets of a spec's time namespace as the kernel takes them, None if it has no such namespace."""
    if {"type": "time"} not in spec["linux"]["namespaces"]:
        return None
    offsets = spec["linux"].get("timeOffsets") or {}
    return "".join(
        f"{clock} {offset.get('secs', 0)} {offset.get('nanosecs', 0)}\n" for clock, offset in offsets.items()
    )


class Control:
    """crun on this machine, in a mount namespace where it knows the control groups."""

    def __init__(self, scratch: Path) -> None:
        self._root = scratch / "crun"
        prepare = "umount /sys/fs/cgroup/unified 2>/dev/null; exec sleep 100000"
        self._holder = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sh", "-c", prepare])
        deadline = time.monotonic() + START_TIMEOUT
        while psutil.Process(self._holder.pid).name() != "sleep":
            assert time.monotonic() < deadline, "no namespace for crun"
            time.sleep(0.01)

    def close(self) -> None:
        self._holder.send_signal(signal.SIGKILL)
        self._holder.wait()

    def run(self, bundle: Path, container_id: str, *, clocks: str | None = None) -> Result:
        """Run a bundle's program to its end, in a time namespace if there are offsets of `clocks`."""
        inside = () if clocks is None else (sys.executable, "-c", CLOCKS, clocks)
        return self._crun("run", "--bundle", str(bundle), container_id, inside=inside)

    def accepts(self, bundle: Path, container_id: str) -> tuple[bool, str]:
        """Whether crun creates the container, and what it says."""
        done = self._crun("create", "--bundle", str(bundle), container_id)
        self._crun("delete", "--force", container_id)
        return done.code == 0, done.stderr

    def _crun(self, *words: str, inside: tuple[str, ...] = ()) -> Result:
        enter = ["nsenter", "-t", str(self._holder.pid), "--mount", *inside]
        argv = [*enter, "crun", "--root", str(self._root), *words]
        # Not pipes: what crun leaves behind may hold them.
        with (self._root.parent / "crun.out").open("w+b") as out, (self._root.parent / "crun.err").open("w+b") as err:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=TIMEOUT,
                check=False,
                env={"PATH": "/usr/bin"},
            )
            out.seek(0)
            err.seek(0)
            return Result(done.returncode, out.read(), err.read())


def prepare_shared(directory: Path) -> Path:
    """What bind mounts are of: a directory, a file, a socket."""
    import socket

    (directory / "directory").mkdir(parents=True)
    (directory / "directory/inside").write_text("inside\n")
    (directory / "file").write_text("of the host\n")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "socket"))
    return directory


def prepare_rootfs(directory: Path) -> Path:
    """A root file system with the probe; everybody may write to some places of it."""
    root = make_rootfs(directory)
    (root / "probe").write_text(PROBE)
    for name in ("home", "var/empty"):
        (root / name).chmod(0o777)
    (root / "home/alice").chmod(0o755)
    return root


def content(directory: Path) -> set[Path]:
    """Everything below a directory."""
    return set(directory.rglob("*"))


def clear(directory: Path, *, but: set[Path]) -> None:
    """Remove what has come to be below a directory: what one example finds must not depend on those before it."""
    for path in sorted(content(directory) - but, reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def seen(output: str) -> dict[str, list[str]]:
    """What the probe printed, by name."""
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        name, bar, value = line.partition("|")
        assert bar, f"no line of the probe: {line!r}"
        found.setdefault(name, []).append(value)
    return found


def written(directory: Path, spec: dict[str, Any] | bytes, rootfs: Path) -> Path:
    """A bundle of this spec; its root is a symlink to `rootfs`."""
    directory.mkdir(exist_ok=True)
    link = directory / "rootfs"
    if not link.is_symlink():
        link.symlink_to(rootfs)
    text = spec if isinstance(spec, bytes) else json.dumps(spec).encode()
    (directory / "config.json").write_bytes(text)
    return directory
