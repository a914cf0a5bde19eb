"""A seccomp section compiled on the host, so that the guest need not.

Inside the guest crun would compile the section anew for every container, which takes it more instructions than all
the rest of creating a container.  crun takes a finished filter in an annotation instead, in preference to the section;
the section stays in the spec for a crun that does not know the annotation.

The compiler is libseccomp, which is on every host that has QEMU.  Where it cannot be used the answer is None, and
the guest compiles.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import vmsandbox
from vmsandbox import cache

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ANNOTATION = "run.oci.seccomp_bpf_data"
LIBRARY = "libseccomp.so.2"
KIND = "seccomp"
#: bytes of one instruction, and how many the kernel accepts
INSTRUCTION = 8
MOST_INSTRUCTIONS = 4096

_ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
KNOWN_ACTIONS = frozenset(_ACTIONS)
_WITH_ERRNO = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
_EPERM = 1
_OPERATORS = {f"SCMP_CMP_{name}": 1 + n for n, name in enumerate(("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))}
_ARCHITECTURES = {"SCMP_ARCH_X86_64": b"x86_64", "SCMP_ARCH_X86": b"x86", "SCMP_ARCH_X32": b"x32"}
KNOWN_ARCHITECTURES = frozenset(_ARCHITECTURES)
#: SCMP_FLTATR_CTL_OPTIMIZE; 2: a binary tree instead of a list
_OPTIMIZE = (8, 2)
_UNKNOWN = -1


def annotation(section: Mapping[str, Any], *, directory: Path | None = None) -> dict[str, str]:
    """The annotation that carries `section` compiled; empty if it cannot be.

    Filters are kept in the cache `directory`, if there is one.
    """
    text = json.dumps(section, sort_keys=True)
    key = hashlib.sha256(f"{vmsandbox.__version__}\n{text}".encode()).hexdigest()
    stored = cache.read(directory, KIND, key) if directory is not None else None
    prefix = f"{key}\n".encode()
    if stored is not None and stored.startswith(prefix) and len(stored) > len(prefix):
        return {ANNOTATION: stored[len(prefix) :].decode("ascii", "replace")}
    encoded = _encoded(text)
    if encoded is None:
        return {}
    if directory is not None:
        cache.write(directory, KIND, key, prefix + encoded)
    return {ANNOTATION: encoded.decode()}


@lru_cache(maxsize=8)
def _encoded(text: str) -> bytes | None:
    program = compiled(json.loads(text))
    return None if program is None else base64.b64encode(program)


def compiled(section: Mapping[str, Any], *, library: str = LIBRARY) -> bytes | None:
    """The filter as an array of instructions; None if libseccomp is missing or does not take the section."""
    import ctypes

    class Comparison(ctypes.Structure):
        _fields_ = (
            ("arg", ctypes.c_uint),
            ("op", ctypes.c_int),
            ("datum_a", ctypes.c_uint64),
            ("datum_b", ctypes.c_uint64),
        )

    try:
        lib = ctypes.CDLL(library)
    except OSError:
        return None
    lib.seccomp_init.restype = ctypes.c_void_p
    lib.seccomp_init.argtypes = [ctypes.c_uint32]
    lib.seccomp_release.restype = None
    lib.seccomp_release.argtypes = [ctypes.c_void_p]
    lib.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    lib.seccomp_arch_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    lib.seccomp_arch_resolve_name.restype = ctypes.c_uint32
    lib.seccomp_arch_resolve_name.argtypes = [ctypes.c_char_p]
    lib.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    lib.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    lib.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(Comparison),
    ]
    lib.seccomp_arch_native.restype = ctypes.c_uint32
    if lib.seccomp_arch_native() != lib.seccomp_arch_resolve_name(b"x86_64"):
        return None
    context = lib.seccomp_init(_action(section["defaultAction"], section.get("defaultErrnoRet")))
    if not context:
        return None
    try:
        # An older library without trees makes a list, which is as good.
        lib.seccomp_attr_set(context, *_OPTIMIZE)
        for name in section["architectures"]:
            if name != "SCMP_ARCH_X86_64":
                lib.seccomp_arch_add(context, lib.seccomp_arch_resolve_name(_ARCHITECTURES[name]))
        for rule in section["syscalls"]:
            action = _action(rule["action"], rule.get("errnoRet"))
            comparisons = [
                Comparison(each["index"], _OPERATORS[each["op"]], each["value"], each["valueTwo"])
                for each in rule.get("args", ())
            ]
            array = (Comparison * len(comparisons))(*comparisons)
            for name in rule["names"]:
                number = lib.seccomp_syscall_resolve_name(name.encode())
                # A system call that this library has never heard of is left to the default, as crun does.
                if number != _UNKNOWN and lib.seccomp_rule_add_array(context, action, number, len(array), array) != 0:
                    return None
        return _exported(lib, context)
    finally:
        lib.seccomp_release(context)


def _exported(lib: Any, context: int) -> bytes | None:  # noqa: ANN401
    descriptor = os.memfd_create("filter", os.MFD_CLOEXEC)
    try:
        if lib.seccomp_export_bpf(context, descriptor) != 0:
            return None
        size = os.fstat(descriptor).st_size
        if not 0 < size <= MOST_INSTRUCTIONS * INSTRUCTION:
            return None
        return os.pread(descriptor, size, 0)
    finally:
        os.close(descriptor)


def _action(name: str, errno: int | None) -> int:
    value = _ACTIONS[name]
    return value | (_EPERM if errno is None else errno) if name in _WITH_ERRNO else value
