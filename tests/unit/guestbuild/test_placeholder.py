"""Libraries that stand for others are taken by the real loader, in the versions that were asked for."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from vmsandbox.guestbuild import elf, placeholder

if TYPE_CHECKING:
    from pathlib import Path

CRUN = "/usr/bin/crun"
SYSTEMD = "libsystemd.so.0"
FUNCTIONS = {"first": "LIB_1", "second": "LIB_2", "third": "LIB_2"}


@pytest.fixture
def library(tmp_path: Path) -> ctypes.CDLL:
    path = tmp_path / "libof.so.1"
    path.write_bytes(placeholder.library(path.name, FUNCTIONS))
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_that_it_is_not_implemented(library: ctypes.CDLL, name: str) -> None:
    assert library[name](1, 2, 3) == -errno.ENOSYS


def test_a_function_is_there_in_its_version_only(library: ctypes.CDLL) -> None:
    dlvsym = ctypes.CDLL(None).dlvsym
    dlvsym.restype = ctypes.c_void_p
    dlvsym.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
    assert dlvsym(library._handle, b"second", b"LIB_2")
    assert not dlvsym(library._handle, b"second", b"LIB_1")
    assert not dlvsym(library._handle, b"fourth", b"LIB_2")


def test_a_program_runs_with_it_and_loads_nothing_for_it(tmp_path: Path) -> None:
    with open(CRUN, "rb") as stream:
        functions = elf.functions_of(stream.read(), SYSTEMD)
    assert functions["sd_notify"].startswith("LIBSYSTEMD_")
    (tmp_path / SYSTEMD).write_bytes(placeholder.library(SYSTEMD, functions))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "LD_DEBUG": "files"}
    done = subprocess.run([CRUN, "--version"], env=environment, capture_output=True, text=True, check=True, timeout=10)
    assert done.stdout.startswith("crun version")
    assert str(tmp_path / SYSTEMD) in done.stderr
    assert "libgcrypt" not in done.stderr


def test_a_program_that_asks_for_one_function_more_does_not_start(tmp_path: Path) -> None:
    with open(CRUN, "rb") as stream:
        functions = elf.functions_of(stream.read(), SYSTEMD)
    functions.pop("sd_notify")
    (tmp_path / SYSTEMD).write_bytes(placeholder.library(SYSTEMD, functions))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([CRUN, "--version"], env=environment, capture_output=True, text=True, check=False, timeout=10)
    assert done.returncode != 0
    assert "sd_notify" in done.stderr


def test_a_library_of_which_nothing_is_used_has_nothing(tmp_path: Path) -> None:
    (tmp_path / "libempty.so").write_bytes(placeholder.library("libempty.so", {}))
    empty = ctypes.CDLL(str(tmp_path / "libempty.so"))
    assert not hasattr(empty, "first")


def test_what_a_file_takes_from_a_library_that_it_does_not_need_is_nothing() -> None:
    with open(CRUN, "rb") as stream:
        assert elf.functions_of(stream.read(), "libnothing.so.1") == {}
