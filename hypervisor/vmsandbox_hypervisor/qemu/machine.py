"""`QemuHypervisor`: makes machines out of QEMU, and finds those that are running already.

QEMU is executed before anything heavy is imported: qemu.qmp loads while QEMU starts.  Everything QEMU needs is a
descriptor made here, so it may run as somebody who can open nothing, and every socket exists before QEMU does.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import time
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vmsandbox_hypervisor import virtiofsd, vsock
from vmsandbox_hypervisor.aio import finish
from vmsandbox_hypervisor.children import Child, confined, read_start_time, spawn
from vmsandbox_hypervisor.errors import BootError, ExitedError, ForkError, MonitorError
from vmsandbox_hypervisor.evidence import CONSOLE_LOG, STDERR_LOG, Evidence
from vmsandbox_hypervisor.qemu import forked, probe
from vmsandbox_hypervisor.qemu.argv import CONSOLE_SOCKET, MONITOR_SOCKET, argv, descriptors, port_socket
from vmsandbox_hypervisor.sockets import hang_up, listening

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from vmsandbox_hypervisor.api import Accel, AccelChoice, Confinement, Parent, Vm, VmConfig

QEMU = Path("/usr/bin/qemu-system-x86_64")


class QemuHypervisor:
    """The driver for QEMU.

    `binary` is what `probe_accel` tries; `accel_cache` is a file that remembers, until the next boot of the host,
    whether KVM works.  `settle` is called with the pid of a machine that is forked, before it runs: it comes from
    where its parent is, not from where we are.
    """

    def __init__(
        self,
        *,
        binary: Path = QEMU,
        accel_cache: Path | None = None,
        settle: Callable[[int], None] = lambda _pid: None,
    ) -> None:
        self._binary = binary
        self._accel_cache = accel_cache
        self._settle = settle

    @asynccontextmanager
    async def running(self, config: VmConfig) -> AsyncIterator[Vm]:
        """Start a machine and keep it for the duration of the block.

        Raises `AccelError` if the acceleration asked for does not work, `BootError` if the machine does not come up,
        and `ForkError` if its parent cannot be forked.  When the block is left, QEMU and its helpers are gone, and so
        is every file that they or we made in `config.directory`; unless `Vm.release` was called: then all goes on.
        """
        choice = await probe.chosen(config.accel, binary=config.binary, cache=self._accel_cache)
        choice = probe.permitted(choice, config)
        # Of a machine that ended together with its owner.
        remove_files(config)
        evidence = Evidence(config.directory)
        if config.parent is None:
            launch = launched(config, choice, evidence)
        else:
            forked.check(config, config.parent)
            await forked.left(config.parent)
            async with forked.alone(config.parent):
                launch = launched(config, choice, evidence, settle=self._settle)
        try:
            from vmsandbox_hypervisor.qemu.vm import opened

            async with opened(
                config,
                accel=choice,
                child=launch.child,
                evidence=evidence,
                stderr=launch.stderr,
                started=launch.started,
                phases={"spawned" if config.parent is None else "forked": launch.spawned - launch.started},
            ) as vm:
                vm.vsock_cid = launch.vsock_cid
                try:
                    yield vm
                finally:
                    launch = launch._replace(keep=vm.released)
        finally:
            await finish(_over(config, launch, evidence))

    @asynccontextmanager
    async def adopted(self, config: VmConfig, *, pid: int, start_time: int) -> AsyncIterator[Vm]:
        """Take over a machine that another process started with the same `config` and released, or died.

        Raises `ExitedError` if it is gone (what it left in `config.directory` is removed), and `MonitorError` if its
        monitor does not answer within `config.boot_timeout`.  The block ends as that of `running`.
        """
        evidence = Evidence(config.directory)
        try:
            child = Child.adopted(f"qemu {config.name}", pid, start_time)
        except ProcessLookupError as error:
            evidence.keep()
            reason = evidence.reason()
            remove_files(config)
            raise ExitedError(
                f"virtual machine '{config.name}' is gone{f': {reason}' if reason else ''}",
                status=None,
                evidence=evidence.text(),
            ) from error
        try:
            evidence.console.open(config.directory / CONSOLE_SOCKET)
            stderr = os.open(config.directory / STDERR_LOG, STDERR_FLAGS, 0o600)
        except OSError as error:
            child.forget()
            evidence.console.close()
            raise MonitorError(f"cannot adopt virtual machine '{config.name}': {_words(error)}") from error
        # A failed adoption leaves the machine to the next one who tries.
        launch = Launch(child=child, stderr=stderr, started=time.perf_counter(), spawned=0.0, vsock_cid=None, keep=True)
        try:
            from vmsandbox_hypervisor.qemu.vm import opened

            async with opened(
                config, accel=None, child=child, evidence=evidence, stderr=stderr, started=launch.started, phases={}
            ) as vm:
                for port in config.ports:
                    await hang_up(vm.port_path(port.name))
                try:
                    yield vm
                finally:
                    launch = launch._replace(keep=vm.released)
        finally:
            await finish(_over(config, launch, evidence))

    async def destroy(self, config: VmConfig, *, pid: int, start_time: int) -> None:
        """End a machine that nobody holds, whether or not it answers, with its helpers and files; it may be gone."""
        daemons = virtiofsd.adopted(config.directory)
        try:
            child = Child.adopted(f"qemu {config.name}", pid, start_time)
        except ProcessLookupError:
            pass  # it ended by itself
        else:
            await finish(child.stop())
        for daemon in daemons:
            await finish(daemon.stop())
        remove_files(config)

    async def probe_accel(self, accel: Accel) -> AccelChoice:
        """Which acceleration `accel` means on this machine, and why; `AccelError` if it cannot be had."""
        return await probe.chosen(accel, binary=self._binary, cache=self._accel_cache)

    def argv(self, config: VmConfig) -> list[str]:
        """The command line for `config`; with ``auto`` as far as it can be told without trying KVM."""
        accel = probe.likely().accel if config.accel == "auto" else config.accel
        line = argv(config, accel, block_devices=[disk.id for disk in config.disks if disk.path.is_block_device()])
        return confined(line, config.confinement, config.labels)


class Launch(NamedTuple):
    """A QEMU that was executed; `keep` tells that it outlives us."""

    child: Child
    stderr: int
    #: `time.perf_counter()` before and after the execution
    started: float
    spawned: float
    vsock_cid: int | None
    keep: bool = False


STDERR_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


def launched(
    config: VmConfig, choice: AccelChoice, evidence: Evidence, *, settle: Callable[[int], None] = lambda _pid: None
) -> Launch:
    """Open everything, execute or fork QEMU, connect the console; on failure nothing is left.

    Then `BootError`, or `ForkError`, says why.
    """
    try:
        with ExitStack() as stack:
            stderr = os.open(config.directory / STDERR_LOG, STDERR_FLAGS, 0o600)
            try:
                opened, cid = _prepared(config, stack)
                # Its listening end exists already, so nothing that is printed can be missed.
                evidence.console.open(config.directory / CONSOLE_SOCKET)
                started = time.perf_counter()
                if config.parent is None:
                    child = _spawned(config, choice, opened, cid, stderr=stderr)
                else:
                    child = _forked(config, config.parent, opened, stderr=stderr, settle=settle)
            except BaseException:
                evidence.console.close()
                os.close(stderr)
                raise
    except ForkError:
        remove_files(config)
        raise
    except (OSError, ValueError) as error:
        remove_files(config)
        if config.parent is not None:
            raise ForkError(f"cannot fork virtual machine '{config.parent.name}': {_words(error)}") from error
        raise BootError(f"cannot start virtual machine '{config.name}': {_words(error)}", phase="prepared") from error
    return Launch(child=child, stderr=stderr, started=started, spawned=time.perf_counter(), vsock_cid=cid)


def _spawned(
    config: VmConfig, choice: AccelChoice, opened: Mapping[str, int], cid: int | None, *, stderr: int
) -> Child:
    block_devices = [disk.id for disk in config.disks if stat.S_ISBLK(os.fstat(opened[f"disk-{disk.id}"]).st_mode)]
    line = argv(config, choice.accel, block_devices=block_devices, vsock_cid=cid)
    numbers = descriptors(config)
    fds = {numbers[role]: fd for role, fd in opened.items()}
    return spawn(f"qemu {config.name}", confined(line, config.confinement, config.labels), fds=fds, stderr=stderr)


def _forked(
    config: VmConfig, parent: Parent, opened: Mapping[str, int], *, stderr: int, settle: Callable[[int], None]
) -> Child:
    pid = forked.forked(config, parent, opened, stderr=stderr, settle=settle)
    try:
        return Child.adopted(f"qemu {config.name}", pid, read_start_time(pid))
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise


def _prepared(config: VmConfig, stack: ExitStack) -> tuple[dict[str, int], int | None]:
    """The descriptors that QEMU gets, by role, and the context id claimed; they are closed here with `stack`."""
    if not os.access(config.binary, os.X_OK):
        raise FileNotFoundError(f"no QEMU at '{config.binary}': install qemu-system-x86")
    opened: dict[str, int] = {}

    def keep(role: str, fd: int) -> None:
        stack.callback(os.close, fd)
        opened[role] = fd

    def listen(role: str, name: str) -> None:
        opened[role] = stack.enter_context(listening(config.directory / name)).fileno()

    listen("monitor", MONITOR_SOCKET)
    listen("console", CONSOLE_SOCKET)
    for port in config.ports:
        listen(f"port-{port.name}", port_socket(port.name))
    if config.parent is None:
        keep("kernel", _readable("kernel", config.kernel.path, config.confinement))
        if config.kernel.initrd is not None:
            keep("initrd", _readable("initrd", config.kernel.initrd, config.confinement))
    if config.memory.backing.fd is not None:
        opened["memory"] = config.memory.backing.fd
    cid = None
    if config.vsock_cid is not None:
        cid, fd = vsock.claim(config.vsock_cid or None)
        keep("vsock", fd)
    for disk in config.disks:
        fd = _opened("disk", disk.path, os.O_RDONLY if disk.read_only else os.O_RDWR)
        keep(f"disk-{disk.id}", fd)
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise OSError(f"cannot use disk '{disk.path}': neither a file nor a block device")
    for nic in config.nics:
        opened[f"nic-{nic.id}"] = nic.tap_fd
        if nic.vhost_fd is not None:
            opened[f"vhost-{nic.id}"] = nic.vhost_fd
    if config.restore is not None:
        # QEMU gets it over the monitor; that it is missing is better known before QEMU runs.
        os.close(_opened("template state", config.restore, os.O_RDONLY))
    return opened, cid


def _opened(what: str, path: Path, flags: int) -> int:
    try:
        # Without blocking: what turns out to be a FIFO must not wait for its other end.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise OSError(f"cannot open {what} '{path}': {error.strerror}") from error
    os.set_blocking(fd, True)
    return fd


def _readable(what: str, path: Path, identity: Confinement | None) -> int:
    """A descriptor that QEMU, as `identity`, can open once more through /proc.

    Opening it again checks the file's mode; a file that only we may read is therefore copied into a memfd.
    """
    fd = _opened(what, path, os.O_RDONLY)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(f"cannot use {what} '{path}': not a regular file")
        if identity is None or _may_read(info, identity):
            return fd
        copy = os.memfd_create(what, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            offset = 0
            while count := os.sendfile(copy, fd, offset, 1 << 30):
                offset += count
            fcntl.fcntl(copy, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except BaseException:
            os.close(copy)
            raise
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return copy


def _may_read(info: os.stat_result, identity: Confinement) -> bool:
    if info.st_uid == identity.uid:
        return bool(info.st_mode & stat.S_IRUSR)
    if info.st_gid in (identity.gid, *identity.groups):
        return bool(info.st_mode & stat.S_IRGRP)
    return bool(info.st_mode & stat.S_IROTH)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"'{error.filename}': {error.strerror}" if error.filename else error.strerror
    return str(error)


async def _over(config: VmConfig, launch: Launch, evidence: Evidence) -> None:
    """End what `running` or `adopted` began."""
    if launch.keep:
        launch.child.forget()
    else:
        await launch.child.stop()
        evidence.keep()
        remove_files(config)
    evidence.console.close()
    os.close(launch.stderr)


def remove_files(config: VmConfig) -> None:
    """Remove what a VM leaves in its directory, and nothing else."""
    names = [MONITOR_SOCKET, CONSOLE_SOCKET, *(port_socket(port.name) for port in config.ports)]
    names += [CONSOLE_LOG, f"{CONSOLE_LOG}.new", STDERR_LOG]
    for name in names:
        (config.directory / name).unlink(missing_ok=True)
    for path in config.directory.glob("virtiofs-*"):
        path.unlink(missing_ok=True)
