"""Where the benchmark works: roots of its own, a small image, and the pods and commands of one run of it.

The guest is the one that is in use; everything else is made below a temporary directory, so nothing that belongs to the
user is read or changed.
"""

from __future__ import annotations

import compileall
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Self

from scripts.benchmarks import processes
from scripts.benchmarks.processes import CommandError, Ended
from scripts.benchmarks.rows import MissingError
from vmsandbox import documents
from vmsandbox.errors import NotFoundError
from vmsandbox.guestbuild import store
from vmsandbox.paths import Roots
from vmsandbox.wire import WireError, receive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

BUSYBOX = ("/bin/busybox", "/usr/bin/busybox", "/usr/lib/busybox/busybox-static")
PACKAGES = ("vmsandbox", "vmsandbox_hypervisor", "vmsandbox_protocol")
APPLETS = (
    "sh",
    "true",
    "sleep",
    "cat",
    "dd",
    "head",
    "echo",
    "wc",
    "nproc",
    "df",
    "find",
    "stat",
    "mkdir",
    "rm",
    "time",
)
IMAGE = "bench"
#: the option with which `run` boots whether there is a template or not
COLD = "--template=off"
#: the nursery's name in /proc, and the seconds that loading may take it
NURSERY, NURSERY_TIMEOUT = "vmsandbox-nurse", 30.0
#: seconds in which no machine to be forked was made is too many; and how long one takes, more or less
PARENT_TIMEOUT, PARENT_TIME = 60.0, 5.0
#: what an idle container runs
IDLE = ("sleep", "1000000")


class Workplace:
    """Temporary roots and what lives in them; everything is gone when the block is left."""

    def __init__(self, *, data_root: str | None = None) -> None:
        self.installed = Roots.chosen(data=data_root)
        self._stack = ExitStack()
        self._pods = 0
        self._configuration: tuple[str, ...] = ()
        #: figures of one measurement that another one needs
        self.notes: dict[str, float] = {}

    def __enter__(self) -> Self:
        # Short: sockets are bound below it.
        self.directory = Path(tempfile.mkdtemp(prefix="vb-", dir="/tmp"))
        self.directory.chmod(0o711)
        self._before = set(processes.children())
        self.roots = Roots(str(self.directory / "r"), str(self.directory / "d"))
        Path(self.roots.data_dir).mkdir(mode=0o711)
        compile_packages()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.close()
        finally:
            processes.end(set(processes.children()) - self._before)
            processes.reap_zombies()
            shutil.rmtree(self.directory, ignore_errors=True)

    # ------------------------------------------------------------ what is needed

    @cached_property
    def guest(self) -> store.Guest:
        """The guest that pods boot; `MissingError` if none was built."""
        try:
            return store.current(self.installed)
        except NotFoundError as error:
            raise MissingError(str(error)) from error

    @cached_property
    def rootfs(self) -> Path:
        """A root file system of busybox and nothing else, the same for every runtime that is measured."""
        busybox = next((Path(path) for path in BUSYBOX if Path(path).exists()), None)
        if busybox is None:
            raise MissingError("no busybox: install busybox-static")
        root = self.directory / "rootfs"
        for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
            (root / name).mkdir(parents=True)
        shutil.copy2(busybox, root / "bin" / "busybox")
        for applet in APPLETS:
            (root / "bin" / applet).symlink_to("busybox")
        return root

    @cached_property
    def image(self) -> str:
        """The name of an image of `rootfs` in the temporary store, beside the guest in use."""
        # Named, not copied: `guest` has verified that it is there.
        key = self.guest.key
        Path(self.roots.data_dir, "guest").symlink_to(self.installed.guests)
        processes.note(f"guest {key[:12]}")
        self.vmsandbox("image", "import", "--name", IMAGE, f"rootfs:{self.rootfs}")
        return IMAGE

    def tool(self, name: str) -> str:
        """The path of a program, or `MissingError`."""
        path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if path is None:
            raise MissingError(f"no program '{name}': install it to have this row")
        return path

    # ------------------------------------------------------------ our own commands

    def command(self, *words: str) -> list[str]:
        """The command line of a verb of ours; containers have no network unless the row is about it."""
        if words[0] == "run" and "--network" not in words and "--pod" not in words:
            words = ("run", "--network", "none", *words[1:])
        program = Path(sys.executable).with_name("vmsandbox")
        roots = ["--root", self.roots.run_dir, "--data-root", self.roots.data_dir]
        return [str(program), *roots, *self._configuration, *words]

    @contextmanager
    def without_forks(self) -> Iterator[None]:
        """Have no pod forked for the block."""
        config = self.directory / "without-forks.toml"
        config.write_text("[sandbox]\nforks = false\n")
        self._configuration = ("--config", str(config))
        try:
            yield
        finally:
            self._configuration = ()
            self.end_nursery()

    def vmsandbox(self, *words: str, settle: bool = False) -> Ended:
        """Run a verb of ours to its end; with `settle`, until nothing that it started is there, its nursery neither."""
        return processes.run(self.command(*words), settle=settle, dismiss=self._dismiss)

    def end_nursery(self) -> None:
        """End what makes the next start faster, if it is there."""
        self._dismiss(set(processes.children()))
        processes.reap_zombies()

    def _dismiss(self, pids: set[int]) -> None:
        """End the nursery among these once it has loaded all that it would: it counts as if nobody had cut it off."""
        for pid in pids:
            if processes.read_stat(pid).name == NURSERY:
                self.await_nursery()
                os.kill(pid, signal.SIGTERM)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    def await_nursery(self) -> None:
        """Wait until the nursery has loaded what it forks, if there is one: only then does it greet."""
        with suppress(OSError, WireError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(NURSERY_TIMEOUT)
            sock.connect(self.roots.nursery_file)
            receive(sock)

    def await_parent(self, *options: str) -> set[int]:
        """Have a machine that pods with these options are forked from; its processes, once it stands and is at rest."""
        deadline = time.monotonic() + PARENT_TIMEOUT
        while not (found := self._parents(shareable="-v" in options)):
            self.vmsandbox("run", "--rm", self.template, *options, self.image, "true")
            if time.monotonic() > deadline:
                raise MissingError("no machine could be forked")
            self.await_nursery()
            self.vmsandbox("run", "--rm", self.template, *options, self.image, "true")
            time.sleep(PARENT_TIME)
        return found

    def _parents(self, *, shareable: bool) -> set[int]:
        """Who keeps one of a kind, and the machine itself."""
        for path in Path(self.roots.parents_dir).glob("*/offer.json"):
            offer = documents.read(str(path))
            if offer["shareable"] == shareable:
                pids = {offer["keeper"]["pid"], offer["machine"]["pid"]}
                return {pid for pid in pids if os.path.exists(f"/proc/{pid}")}
        return set()

    @cached_property
    def sharing(self) -> tuple[str, str]:
        """The option with which `run` shares a directory."""
        directory = self.directory / "shared"
        directory.mkdir()
        return "-v", f"{directory}:/mnt"

    @cached_property
    def template(self) -> str:
        """The option with which `run` starts a clone or fails; the template is made first."""
        _ = self.image
        self.vmsandbox("template", "build")
        return "--template=require"

    @cached_property
    def pod_template(self) -> str:
        """The same for `pod create`, whose machines have more slots."""
        _ = self.image
        self.vmsandbox("template", "build", "--pod")
        return "--template=require"

    def start_pod(self, *command: str, options: tuple[str, ...] = (COLD,), image: str = "") -> tuple[str, set[int]]:
        """Start a detached container; its name, and the processes that are there because of it."""
        self._pods += 1
        name = f"bench-{self._pods}"
        image = image or self.image
        before = set(processes.children())
        self.vmsandbox("run", "-d", "--name", name, *options, image, *command)
        started = set(processes.children()) - before
        return name, processes.descendants(started)

    def remove(self, name: str) -> None:
        """Remove a container whatever it does."""
        self.vmsandbox("rm", "-f", name, settle=False)

    def on_exit(self, name: str) -> None:
        """Remove a container when the workplace is left."""
        self._stack.callback(self.remove_quietly, name)

    def remove_quietly(self, name: str) -> None:
        """Remove a container; one that never came to be is fine."""
        try:
            self.remove(name)
        except CommandError as error:
            processes.note(f"bench: {error}")

    def keep(self, stack: ExitStack) -> None:
        """Unwind `stack` when the workplace is left."""
        self._stack.push(stack.pop_all())

    @cached_property
    def idle_pod(self) -> tuple[str, set[int]]:
        """A pod that was booted and whose container sleeps, for all rows that need one; name and processes."""
        name, pids = self.start_pod(*IDLE)
        self.on_exit(name)
        return name, pids


def compile_packages() -> None:
    """Byte-compile our packages as pip does at an installation: a checkout need not have been, nor be kept so."""
    for package in PACKAGES:
        spec = find_spec(package)
        for directory in (spec.submodule_search_locations if spec is not None else None) or ():
            compileall.compile_dir(directory, quiet=2)
