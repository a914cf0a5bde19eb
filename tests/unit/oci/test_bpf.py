"""Compiled seccomp filters, run on an interpreter of the kernel's little machine."""

from __future__ import annotations

import base64
import errno
import struct
from typing import TYPE_CHECKING, Any

import pytest

from vmsandbox.oci import bpf
from vmsandbox.oci.capabilities import KNOWN, adjusted
from vmsandbox.oci.seccomp import resolved, section

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

X86_64 = 0xC000003E
I386 = 0x40000003
ALLOW = 0x7FFF0000
KILL = 0x00000000


def refusal(number: int) -> int:
    return 0x00050000 | number


def verdict(program: bytes, number: int, args: Sequence[int] = (), *, arch: int = X86_64) -> int:
    """What the kernel would do about a system call: classic BPF over struct seccomp_data."""
    data = struct.pack("<iIQ6Q", number, arch, 0, *args, *[0] * (6 - len(args)))
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator = at = 0
    while True:
        operation, jump_true, jump_false, operand = code[at]
        at += 1
        match operation:
            case 0x20:  # load a word
                (accumulator,) = struct.unpack_from("<I", data, operand)
            case 0x54:  # and
                accumulator &= operand
            case 0x05:  # jump
                at += operand
            case 0x15:
                at += jump_true if accumulator == operand else jump_false
            case 0x25:
                at += jump_true if accumulator > operand else jump_false
            case 0x35:
                at += jump_true if accumulator >= operand else jump_false
            case 0x06:
                return operand
            case _:
                pytest.fail(f"instruction {operation:#x} is not known")


def default(capabilities: Sequence[str] | None = None) -> bytes:
    program = bpf.compiled(section("default", adjusted() if capabilities is None else capabilities))
    assert program is not None, "libseccomp comes with QEMU"
    return program


READ, OPEN, CLONE, PERSONALITY, MOUNT, SOCKET, CLONE3 = 0, 2, 56, 135, 165, 41, 435


@pytest.mark.parametrize(
    ("number", "args", "expected"),
    [
        (READ, (), ALLOW),
        (MOUNT, (), refusal(errno.EPERM)),
        (CLONE3, (), refusal(errno.ENOSYS)),
        (9999, (), refusal(errno.ENOSYS)),
        (CLONE, (0x00010F00,), ALLOW),
        (CLONE, (0x10000000,), refusal(errno.EPERM)),
        (CLONE, (0x40020000,), refusal(errno.EPERM)),
        (PERSONALITY, (0,), ALLOW),
        (PERSONALITY, (0xFFFFFFFF,), ALLOW),
        (PERSONALITY, (1,), refusal(errno.ENOSYS)),
        (SOCKET, (2, 1, 0), ALLOW),
        (SOCKET, (40, 1, 0), refusal(errno.EPERM)),
    ],
)
def test_the_default_profile_decides(number: int, args: tuple[int, ...], expected: int) -> None:
    assert verdict(default(), number, args) == expected


def test_capabilities_decide_too() -> None:
    assert verdict(default(KNOWN), MOUNT) == ALLOW
    assert verdict(default(KNOWN), CLONE, (0x10000000,)) == ALLOW
    assert verdict(default(KNOWN), CLONE3) == ALLOW
    assert verdict(default(()), 161) == refusal(errno.EPERM), "chroot"


def test_32_bit_programs_are_filtered_by_their_own_numbers() -> None:
    program = default()
    assert verdict(program, 3, arch=I386) == ALLOW, "read"
    assert verdict(program, 21, arch=I386) == refusal(errno.EPERM), "mount"
    assert verdict(program, 120, (0x10000000,), arch=I386) == refusal(errno.EPERM), "clone"


def test_other_architectures_are_killed() -> None:
    assert verdict(default(), READ, arch=0xC00000B7) == KILL
    assert verdict(default(), 0x40000000 | READ) in (KILL, refusal(errno.ENOSYS)), "x32"


def test_the_filter_is_a_tree() -> None:
    """A list would make the kernel try some three hundred comparisons for the last system call."""
    assert len(default()) // 8 < 2048
    steps = 0
    program = default()
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    data, at = {0: 231, 4: X86_64}, 0
    accumulator = 0
    while code[at][0] != 0x06:
        operation, jump_true, jump_false, operand = code[at]
        at += 1
        steps += 1
        if operation == 0x20:
            accumulator = data.get(operand, 0)
        elif operation == 0x05:
            at += operand
        else:
            holds = {0x15: accumulator == operand, 0x25: accumulator > operand, 0x35: accumulator >= operand}[operation]
            at += jump_true if holds else jump_false
    assert steps < 40


def test_every_action_and_operator_is_known() -> None:
    operators = ("NE", "LT", "LE", "EQ", "GE", "GT")
    rules: list[dict[str, Any]] = [
        {
            "names": ["open"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": 30 + index,
            "args": [{"index": index, "value": 1 << 40, "op": f"SCMP_CMP_{operator}"}],
        }
        for index, operator in enumerate(operators)
    ]
    actions = ("KILL", "KILL_PROCESS", "KILL_THREAD", "TRAP", "LOG", "TRACE")
    names = ("read", "write", "close", "stat", "fstat", "lstat")
    rules += [{"names": [name], "action": f"SCMP_ACT_{action}"} for name, action in zip(names, actions, strict=True)]
    program = bpf.compiled(resolved({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}, []))
    assert program is not None
    assert verdict(program, OPEN, (1 << 40, 1 << 41, 1 << 41, 1 << 40, 0, 0)) == refusal(33)
    assert verdict(program, OPEN, (1 << 40, 1 << 41, 1 << 41, 0, 1 << 40, 0)) == refusal(34)
    assert [verdict(program, number) for number in range(2)] == [0x00000000, 0x00000000 | 0x80000000]
    assert [verdict(program, number) for number in (4, 5, 6)] == [0x00030000, 0x7FFC0000, 0x7FF00001]


def test_an_unknown_system_call_is_left_to_the_default() -> None:
    rules = [{"names": ["no_such_call", "read"], "action": "SCMP_ACT_ERRNO"}]
    program = bpf.compiled(resolved({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}, []))
    assert program is not None
    assert (verdict(program, READ), verdict(program, OPEN)) == (refusal(1), ALLOW)


def test_what_libseccomp_refuses_is_left_to_the_guest() -> None:
    twice = [{"index": 0, "value": value, "op": "SCMP_CMP_NE"} for value in (1, 2)]
    rules = [{"names": ["read"], "action": "SCMP_ACT_LOG", "args": twice}]
    assert bpf.annotation(resolved({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}, [])) == {}


def test_without_libseccomp_the_guest_compiles() -> None:
    assert bpf.compiled(section("default", adjusted()), library="libnothing.so.9") is None


def test_the_annotation_carries_the_filter_and_is_kept(tmp_path: Path) -> None:
    found = section("default", adjusted())
    directory = tmp_path / "cache"
    first = bpf.annotation(found, directory=directory)
    assert base64.b64decode(first["run.oci.seccomp_bpf_data"]) == default()
    (stored,) = directory.iterdir()
    head, _, _ = stored.read_bytes().partition(b"\n")
    stored.write_bytes(head + b"\nkept")
    assert bpf.annotation(found, directory=directory) == {"run.oci.seccomp_bpf_data": "kept"}
    stored.write_bytes(b"0" * len(head) + b"\nforeign")
    assert bpf.annotation(found, directory=directory) == first
