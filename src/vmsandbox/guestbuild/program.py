"""Tiny static programs that are nothing but system calls, written without a compiler.

The first programs of a guest (load modules, mount the root, start the agent) are straight lines of system calls with
constant arguments.  `Program` collects them and `elf` turns them into a static x86-64 executable of a few KiB: no
tool chain to install, identical bytes everywhere, and under emulation ~100 ms less than a shell script.

A call that fails ends the program: its message goes to standard error and the error number becomes the exit
status.  As PID 1 that is a kernel panic whose last lines on the console name the step that failed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

WRITE: Final = 1
OPEN: Final = 2
CLOSE: Final = 3
NANOSLEEP: Final = 35
EXECVE: Final = 59
EXIT: Final = 60
CHDIR: Final = 80
UNLINK: Final = 87
CHROOT: Final = 161
MOUNT: Final = 165
REBOOT: Final = 169
FINIT_MODULE: Final = 313

#: where the file is mapped; anything above the lowest pages will do
BASE: Final = 0x400000
_HEADERS: Final = 64 + 56
#: rdi, rsi, rdx, r10, r8, r9
_LOAD_ARGUMENT: Final = (b"\x48\xbf", b"\x48\xbe", b"\x48\xba", b"\x49\xba", b"\x49\xb8", b"\x49\xb9")
#: mov <argument register>, r12
_LOAD_RESULT: Final = (
    b"\x4c\x89\xe7", b"\x4c\x89\xe6", b"\x4c\x89\xe2", b"\x4d\x89\xe2", b"\x4d\x89\xe0", b"\x4d\x89\xe1",
)  # fmt: skip
_PAUSE_NS: Final = 5_000_000


class _Result:
    """What the last call that was to be remembered returned."""


RESULT: Final = _Result()


@dataclass(frozen=True)
class Vector:
    """A zero-terminated array of strings, as execve takes."""

    items: tuple[bytes, ...]


Argument = int | bytes | Vector | _Result


@dataclass(frozen=True)
class _Call:
    number: int
    arguments: tuple[Argument, ...]
    failure: str | None
    attempts: int
    remembered: bool


class Program:
    """A sequence of system calls; see the module's text for what a failure does."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    def call(
        self,
        number: int,
        *arguments: Argument,
        failure: str | None,
        attempts: int = 1,
        remember: bool = False,
    ) -> None:
        """Add one call.

        Strings are zero-terminated.  `failure` is the message for when it fails, None if that does not matter;
        with several `attempts` it is tried again every 5 ms.  `remember` keeps what it returns for `RESULT`.
        """
        self._calls.append(_Call(number, arguments, failure, attempts, remember))

    def elf(self) -> bytes:
        """The executable.  It ends with status 0 if the last call returns."""
        # The code's size does not depend on the addresses in it, so a first pass with any address tells where the
        # data begins.
        size = len(self._code(_Data(0)))
        data = _Data(BASE + _HEADERS + size)
        code = self._code(data)
        total = _HEADERS + size + len(data.content)
        header = struct.pack(
            "<16sHHIQQQIHHHHHH",
            b"\x7fELF\x02\x01\x01", 2, 62, 1, BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 64, 0, 0,
        )  # fmt: skip
        read_write_execute = 7
        segment = struct.pack("<IIQQQQQQ", 1, read_write_execute, 0, BASE, BASE, total, total, 0x1000)
        return header + segment + code + bytes(data.content)

    def _code(self, data: _Data) -> bytes:
        code = bytearray()
        for call in self._calls:
            if call.attempts > 1:
                code += b"\x41\xbd" + struct.pack("<I", call.attempts)  # mov r13d, attempts
            again = len(code)
            code += _system_call(call.number, call.arguments, data)
            if call.remembered:
                code += b"\x49\x89\xc4"  # mov r12, rax
            if call.failure is None:
                continue
            on_failure = b""
            if call.attempts > 1:
                on_failure += b"\x49\x89\xc6"  # mov r14, rax
                on_failure += _system_call(NANOSLEEP, (data.add(struct.pack("<QQ", 0, _PAUSE_NS)), 0), data)
                on_failure += b"\x41\xff\xcd"  # dec r13d
                # jnz again: back over the test, the jump across this block, and what there is of it
                back = len(code) + 3 + 6 + len(on_failure) + 6 - again
                on_failure += b"\x0f\x85" + struct.pack("<i", -back)
                on_failure += b"\x4c\x89\xf0"  # mov rax, r14
            on_failure += _fail(call.failure, data)
            code += b"\x48\x85\xc0"  # test rax, rax
            code += b"\x0f\x89" + struct.pack("<i", len(on_failure))  # jns past the failure
            code += on_failure
        return bytes(code + _system_call(EXIT, (0,), data))


class _Data:
    """Constants behind the code, each once."""

    def __init__(self, address: int) -> None:
        self.address = address
        self.content = bytearray()
        self._known: dict[bytes, int] = {}

    def add(self, value: bytes) -> int:
        """The address of these bytes, aligned for pointers."""
        if value not in self._known:
            self.content += bytes(-(self.address + len(self.content)) % 8)
            self._known[value] = self.address + len(self.content)
            self.content += value
        return self._known[value]

    def argument(self, value: int | bytes | Vector) -> int:
        if isinstance(value, bytes):
            return self.add(value + b"\0")
        if isinstance(value, Vector):
            return self.add(struct.pack(f"<{len(value.items) + 1}Q", *map(self.argument, value.items), 0))
        return value


def _system_call(number: int, arguments: Sequence[Argument], data: _Data) -> bytes:
    code = bytearray()
    for position, value in enumerate(arguments):
        if isinstance(value, _Result):
            code += _LOAD_RESULT[position]
        else:
            code += _LOAD_ARGUMENT[position] + struct.pack("<Q", data.argument(value) & (1 << 64) - 1)
    return bytes(code + b"\xb8" + struct.pack("<I", number) + b"\x0f\x05")


def _fail(message: str, data: _Data) -> bytes:
    text = message.encode() + b"\n"
    code = b"\x49\x89\xc6"  # mov r14, rax
    code += _system_call(WRITE, (2, data.add(text), len(text)), data)
    code += b"\x4c\x89\xf7"  # mov rdi, r14
    code += b"\x48\xf7\xdf"  # neg rdi
    return code + b"\xb8" + struct.pack("<I", EXIT) + b"\x0f\x05"
