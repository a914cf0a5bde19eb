"""The guest image: a read-only erofs with Python, crun, the agent and the kernel's modules, and nothing else.

Files are *picked* out of unpacked packages: programs, the standard library without what an agent cannot use, and
of the shared libraries those that somebody asks for.  Python is byte-compiled by the image's own interpreter and
its source is left out; tracebacks still name file and line.  Same inputs give the same bytes: no file keeps a time,
an owner or a mode of the machine it was built on, and hash randomisation is off while compiling.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmsandbox.errors import NotFoundError
from vmsandbox.guestbuild import elf, initramfs, placeholder
from vmsandbox.guestbuild.steps import BuildError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmsandbox.guestbuild.steps import Steps

#: where everything in the image comes from, with what these depend on
PACKAGES: Final = ("python3.11-minimal", "libpython3.11-stdlib", "crun", "busybox-static")
#: by their names in the lock file
WHEELS: Final = ("h2", "hpack", "hyperframe", "protobuf")

AGENT_DIRECTORY: Final = "usr/lib/vmsandbox"
COMMAND: Final = (
    "/usr/bin/python3", "-I", "-S", "-B", "-X", "frozen_modules=on", f"/{AGENT_DIRECTORY}/vmsandbox_agent/launcher.pyc",
)  # fmt: skip

_PYTHON: Final = "usr/bin/python3.11"
_STDLIB: Final = "usr/lib/python3.11"
_LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
_LOADER: Final = "usr/lib64/ld-linux-x86-64.so.2"
#: taken as they are: place in a package -> place in the image
_PROGRAMS: Final = {
    "usr/bin/python3.11": _PYTHON,
    "usr/bin/crun": "usr/bin/crun",
    "bin/busybox": "usr/bin/busybox",
    "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2": _LOADER,
}
_LINKS: Final = {
    "bin": "usr/bin",
    "sbin": "usr/sbin",
    "lib": "usr/lib",
    "lib64": "usr/lib64",
    "usr/bin/python3": "python3.11",
    # The kernel calls it when a file system or protocol is first used.
    "usr/sbin/modprobe": "../bin/busybox",
    **{f"etc/{name}": f"/run/vmsandbox/etc/{name}" for name in ("hostname", "hosts", "resolv.conf", "machine-id")},
}
#: libraries of which no function is ever called -> what was linked with them.  crun asks systemd for control groups
#: where it is told to, which the agent does not do; with the five libraries that it needs, it is half of what is loaded
#: for each call of crun
_PLACEHOLDERS: Final = {"libsystemd.so.0": "usr/bin/crun"}
#: libraries that are only named by what was linked with them: protobuf's C is, with the library of C++
_UNUSED: Final = {"libstdc++.so.6": f"{AGENT_DIRECTORY}/google/_upb/_message.abi3.so"}
#: mount points, and what programs expect to be there
_DIRECTORIES: Final = ("dev", "etc", "proc", "run", "sys", "tmp", "root", "usr/sbin", "var")
_FILES: Final = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/false\n",
    "etc/group": "root:x:0:\n",
    "etc/os-release": "ID=vmsandbox\nNAME=vmsandbox\n",
}
#: parts of the standard library that are of no use to the agent
_LEFT_OUT: Final = frozenset(
    """
    __phello__ curses dbm distutils ensurepip idlelib lib2to3 pydoc_data sqlite3 test tkinter turtledemo unittest venv
    wsgiref xmlrpc __hello__ antigravity cgi cgitb crypt doctest ftplib imaplib mailbox mailcap modulefinder nntplib
    pdb poplib pydoc smtpd smtplib sndhdr sunau telnetlib this turtle webbrowser xdrlib
    _sysconfigdata__linux_x86_64-linux-gnu _sysconfigdata__x86_64-linux-gnu
    _bz2 _codecs_cn _codecs_hk _codecs_iso2022 _codecs_jp _codecs_kr _codecs_tw _crypt _ctypes_test _curses
    _curses_panel _dbm _hashlib _lsprof _lzma _multibytecodec _sqlite3 _ssl _testbuffer _testcapi _testclinic
    _testimportmultiple _testinternalcapi _testmultiphase _uuid _xxsubinterpreters _xxtestfuzz audioop nis ossaudiodev
    readline xxlimited xxlimited_35
    """.split()  # noqa: SIM905
)
_UUID: Final = "766d7361-6e64-626f-7800-67756573742e"


def base(packages: Path, wheels: Path, directory: Path, steps: Steps) -> None:
    """Make in `directory` all of the image that does not change with our own code, from what was unpacked."""
    for name in _DIRECTORIES:
        (directory / name).mkdir(parents=True)
    for source, target in _PROGRAMS.items():
        _copy(packages / source, directory / target)
    for name, target in _LINKS.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).symlink_to(target)
    for name, text in _FILES.items():
        (directory / name).write_text(text)
    init = directory / "usr/sbin/init"
    init.write_bytes(initramfs.launcher(*COMMAND))
    init.chmod(0o755)
    _copy_python(packages / _STDLIB, directory / _STDLIB, left_out=_LEFT_OUT)
    _copy_python(wheels, directory / AGENT_DIRECTORY)
    for name, program in (*_PLACEHOLDERS.items(), *_UNUSED.items()):
        functions = elf.functions_of((directory / program).read_bytes(), name)
        if functions and name in _UNUSED:
            raise BuildError(f"'{program}' uses '{name}' after all ({', '.join(functions)}): it has to be in the image")
        (directory / _LIBRARIES).mkdir(parents=True, exist_ok=True)
        (directory / _LIBRARIES / name).write_bytes(placeholder.library(name, functions))
    _copy_libraries(packages, directory)
    compile_python(directory, [_STDLIB, AGENT_DIRECTORY], steps)


def add_sources(sources: Iterable[Path], directory: Path, steps: Steps) -> None:
    """Add our own packages, compiled, to a base."""
    places = []
    for source in sources:
        place = f"{AGENT_DIRECTORY}/{source.name}"
        _copy_python(source, directory / place)
        places.append(place)
    compile_python(directory, places, steps)


def compile_python(directory: Path, places: Iterable[str], steps: Steps) -> None:
    """Replace the Python sources below `places` by byte code of the interpreter in the image."""
    listed = list(places)
    interpreter: list[str | Path] = [directory / _LOADER, "--library-path", directory / _LIBRARIES, directory / _PYTHON]
    options: list[str | Path] = ["-q", "-b", "--invalidation-mode", "unchecked-hash", "-s", directory, "-p", "/"]
    steps.run(
        [
            *interpreter,
            "-s",
            "-S",
            "-P",
            "-B",
            "-X",
            "no_debug_ranges",
            "-m",
            "compileall",
            *options,
            *(directory / place for place in listed),
        ],
        # What byte code looks like must not depend on the order of sets.
        environment={"PYTHONHASHSEED": "0"},
    )
    for place in listed:
        for path in (directory / place).rglob("*.py"):
            if not path.with_suffix(".pyc").exists():
                raise NotFoundError(f"'{path}' was not compiled: run 'scripts/setup' and build again")
            path.unlink()


def pack(directory: Path, file: Path, steps: Steps) -> None:
    """Write `directory` to `file` as an erofs.

    It is not compressed: what an emulated guest spends on decompressing is a tenth of the agent's start, and the file
    is shared by all pods.
    """
    for parent, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = Path(parent, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    directory.chmod(0o755)
    options = ["-T0", f"-U{_UUID}", "--all-root", "-x-1"]
    steps.run(["mkfs.erofs", "--quiet", *options, file, directory])


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if os.access(source, os.X_OK) or elf.is_elf(target.read_bytes()[:16]) else 0o644)


def _copy_python(source: Path, target: Path, *, left_out: frozenset[str] = frozenset()) -> None:
    """Copy Python sources and extension modules, and nothing else that lies among them."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_symlink() or path.suffix not in (".py", ".so") or "__pycache__" in relative.parts:
            continue
        if not left_out & {part.split(".", 1)[0] for part in relative.parts}:
            _copy(path, target / relative)


def _copy_libraries(packages: Path, directory: Path) -> None:
    """Copy the shared libraries that what is in the image needs, and those that these need."""
    places = [
        packages / place for place in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "lib", "usr/lib")
    ]
    todo = [path for path in sorted(directory.rglob("*")) if path.is_file() and not path.is_symlink()]
    while todo:
        with open(todo.pop(), "rb") as stream:
            data = stream.read()
        if not elf.is_elf(data):
            continue
        for name in elf.needed(data):
            target = directory / _LIBRARIES / name
            if target.exists() or name == os.path.basename(_LOADER):
                continue
            source = next((place / name for place in places if (place / name).exists()), None)
            if source is None:
                raise NotFoundError(f"no package of the guest image has the library '{name}'")
            _copy(source, target)
            todo.append(target)
