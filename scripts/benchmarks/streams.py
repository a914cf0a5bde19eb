"""Bandwidth of a container's stdio, against that of the virtio-serial port which it all passes through.

Both directions go through a pipe on the host.  The clock runs from the first byte to the last, so that the start of an
exec does not count; what arrived is counted where it arrived.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import tempfile
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks import processes
from scripts.benchmarks.processes import CommandError
from scripts.benchmarks.rows import MissingError, Row, measurement

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from scripts.benchmarks.workplace import Workplace
    from vmsandbox_hypervisor.testing.guest import TestGuest

MIB = 1024 * 1024
#: what passes in each direction, by the port alone as by a container's stdio
AMOUNT_MIB = 96
BLOCK = 256 * 1024
BLOCKS = AMOUNT_MIB * MIB // BLOCK
#: seconds
PORT_TIMEOUT = 120.0
RAW_PORT = "bench.raw"
FIND_PORT = (
    f'for n in /sys/class/virtio-ports/*/name; do [ "$(cat $n)" = {RAW_PORT} ] && basename $(dirname $n); done; true'
)


@measurement(
    Row("virtio_serial_out", "MiB/s", "guest to host through one virtio-serial port, nothing else"),
    Row("virtio_serial_in", "MiB/s", "host to guest through it"),
    most_runs=3,
    warm_up=False,
)
def virtio_serial(place: Workplace) -> Mapping[str, float]:
    """A bare guest with a shell on one port and the bytes on another."""
    return asyncio.run(_port_bandwidth(place))


@measurement(
    Row("stdio_out", "MiB/s", "stdout of a container to a pipe on the host", against="virtio_serial_out"), most_runs=3
)
def stdio_out(place: Workplace) -> Mapping[str, float]:
    name, _ = place.idle_pod
    command = place.command("exec", name, "dd", "if=/dev/zero", f"bs={MIB}", f"count={AMOUNT_MIB}")
    with _piped(command) as (_, output):
        first = os.read(output, BLOCK)
        began = time.monotonic()
        received = len(first)
        while data := os.read(output, BLOCK):
            received += len(data)
        seconds = time.monotonic() - began
    if received != AMOUNT_MIB * MIB:
        raise CommandError(f"{received} bytes of {AMOUNT_MIB * MIB} arrived")
    return {"stdio_out": (received - len(first)) / MIB / seconds}


@measurement(
    Row("stdio_in", "MiB/s", "stdin of a container from a pipe on the host", against="virtio_serial_in"), most_runs=3
)
def stdio_in(place: Workplace) -> Mapping[str, float]:
    name, _ = place.idle_pod
    # Not wc, which takes a byte at a time and is slower than what is measured.
    command = place.command(
        "exec", "-i", name, "sh", "-c", f"echo ready; dd of=/dev/null bs={BLOCK} iflag=fullblock 2>&1"
    )
    block = bytes(BLOCK)
    with _piped(command) as (given, output):
        _read_line(output)
        began = time.monotonic()
        for _ in range(AMOUNT_MIB * MIB // BLOCK):
            _write_all(given, block)
        os.close(given)
        counted = _read_line(output)
        seconds = time.monotonic() - began
    if counted != f"{AMOUNT_MIB * MIB // BLOCK}+0 records in\n":
        raise CommandError(f"not everything arrived: {counted}")
    return {"stdio_in": AMOUNT_MIB / seconds}


@contextmanager
def _piped(argv: list[str]) -> Iterator[tuple[int, int]]:
    """Run a command with pipes as stdin and stdout; our ends of them.  `CommandError` if it fails."""
    its_input, given = os.pipe()
    output, its_output = os.pipe()
    with tempfile.TemporaryFile() as stderr:
        try:
            pid = processes.spawn(argv, stdin=its_input, stdout=its_output, stderr=stderr.fileno())
        finally:
            os.close(its_input)
            os.close(its_output)
        try:
            yield given, output
        finally:
            for fd in (given, output):
                _close(fd)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != 0:
            stderr.seek(0)
            raise CommandError(
                f"'{' '.join(argv)}' {processes.described(status)}: {processes.last_line(stderr.read())}"
            )


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        return  # the measurement has closed it to end the input


def _read_line(fd: int) -> str:
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(fd, 1)
        if not data:
            raise CommandError(f"the container's output ended after '{line.decode(errors='replace')}'")
        line += data
    return line.decode()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# ---------------------------------------------------------------- the port alone


async def _port_bandwidth(place: Workplace) -> dict[str, float]:
    async with _guest_with_port(place) as (guest, path):
        device = await guest.run(FIND_PORT)
        if not re.fullmatch(r"vport\d+p\d+", device):
            raise CommandError(f"the guest does not find port '{RAW_PORT}'")
        with socket.socket(socket.AF_UNIX) as port:
            port.connect(str(path))
            port.settimeout(PORT_TIMEOUT)
            copy = f"dd if=/dev/zero of=/dev/{device} bs={BLOCK} count={BLOCKS}"
            sending = asyncio.create_task(guest.run(copy, timeout=PORT_TIMEOUT))
            out = await asyncio.to_thread(_receive, port)
            await sending
            copy = f"dd if=/dev/{device} of=/dev/null bs={BLOCK} count={BLOCKS} iflag=fullblock"
            counting = asyncio.create_task(guest.run(copy, timeout=PORT_TIMEOUT))
            began = await asyncio.to_thread(_send, port)
            counted = await counting
            seconds = time.monotonic() - began
    if not counted.startswith(f"{BLOCKS}+0 records in"):
        raise CommandError(f"not everything arrived: {counted}")
    return {"virtio_serial_out": out, "virtio_serial_in": AMOUNT_MIB / seconds}


def _receive(port: socket.socket) -> float:
    """Take everything; MiB/s from the first byte on."""
    first = received = len(port.recv(MIB))
    began = time.monotonic()
    while received < AMOUNT_MIB * MIB:
        data = port.recv(MIB)
        if not data:
            raise CommandError(f"the port was closed after {received} bytes")
        received += len(data)
    return (received - first) / MIB / (time.monotonic() - began)


def _send(port: socket.socket) -> float:
    """Give everything; when the first block was taken."""
    block = bytes(BLOCK)
    port.sendall(block)
    began = time.monotonic()
    for _ in range(BLOCKS - 1):
        port.sendall(block)
    return began


@asynccontextmanager
async def _guest_with_port(place: Workplace) -> AsyncIterator[tuple[TestGuest, Path]]:
    """A booted test guest with a second port; the path of its socket on the host."""
    try:
        # The library's fixtures need pytest, which comes with the packages for development.
        from vmsandbox_hypervisor.api import Kernel, Memory, Port, VmConfig
        from vmsandbox_hypervisor.errors import HypervisorError
        from vmsandbox_hypervisor.frequency import host_khz
        from vmsandbox_hypervisor.kernel import parameters
        from vmsandbox_hypervisor.qemu.machine import QemuHypervisor
        from vmsandbox_hypervisor.testing import guest as test_guest
    except ImportError as error:
        raise MissingError(f"the hypervisor's test guest cannot be used: {error}") from error
    try:
        files = await asyncio.to_thread(test_guest.guest_files)
    except test_guest.GuestError as error:
        raise MissingError(str(error)) from error
    directory = Path(tempfile.mkdtemp(prefix="p", dir=place.directory))
    hypervisor = QemuHypervisor()
    accel = (await hypervisor.probe_accel("auto")).accel
    config = VmConfig(
        name="bench-port",
        directory=directory,
        kernel=Kernel(path=files.kernel, initrd=files.initrd, cmdline=parameters(accel, khz=host_khz())),
        memory=Memory(size_mib=256),
        ports=(Port(name=test_guest.PORT), Port(name=RAW_PORT)),
        accel=accel,
    )
    try:
        async with hypervisor.running(config) as vm:
            guest = test_guest.TestGuest(vm.port_path(test_guest.PORT))
            await guest.run("true", timeout=120)
            yield guest, vm.port_path(RAW_PORT)
    except (HypervisorError, test_guest.GuestError) as error:
        raise CommandError(str(error)) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
