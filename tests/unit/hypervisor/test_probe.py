"""Whether KVM works, found out rather than believed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from vmsandbox_hypervisor.api import AccelChoice, Confinement, Kernel, Memory, VmConfig
from vmsandbox_hypervisor.errors import AccelError
from vmsandbox_hypervisor.qemu import probe
from vmsandbox_hypervisor.qemu.machine import QEMU

FLAGS = "processor\t: 0\nflags\t\t: fpu vme svm avx\n"


@pytest.fixture
def capable(tmp_path: Path) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text(FLAGS)
    return path


def imitation(tmp_path: Path, script: str) -> Path:
    """A QEMU that notes each start."""
    path = tmp_path / "qemu"
    path.write_text(f"#!/bin/sh\necho >> {tmp_path}/starts\n{script}\n")
    path.chmod(0o755)
    return path


def starts(tmp_path: Path) -> int:
    path = tmp_path / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


async def test_software_emulation_needs_no_proof() -> None:
    choice = await probe.chosen("tcg", binary=Path("/nonexistent"))
    assert (choice.accel, choice.reason) == ("tcg", "software emulation was asked for")


async def test_cheap_signs_spare_the_trial(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu vmxsomething svmlock\n")
    qemu = imitation(tmp_path, "exit 85")
    choice = await probe.chosen("auto", binary=qemu, device=tmp_path / "none", cpuinfo=tmp_path / "cpuinfo")
    assert choice.accel == "tcg"
    assert "cannot be opened: No such file or directory" in choice.reason
    choice = await probe.chosen("auto", binary=qemu, device=Path("/dev/null"), cpuinfo=tmp_path / "cpuinfo")
    assert choice.accel == "tcg"
    assert "neither vmx nor svm" in choice.reason
    assert starts(tmp_path) == 0


async def test_a_guest_that_ran_is_the_proof(tmp_path: Path, capable: Path) -> None:
    qemu = imitation(tmp_path, f"exit {probe.EXIT_STATUS}")
    for accel in ("auto", "kvm"):
        choice = await probe.chosen(accel, binary=qemu, device=Path("/dev/null"), cpuinfo=capable)  # type: ignore[arg-type]
        assert (choice.accel, choice.reason) == ("kvm", "a guest ran with it")


async def test_flags_alone_are_no_proof(tmp_path: Path, capable: Path) -> None:
    qemu = imitation(tmp_path, "echo 'qemu: error: failed to set MSR 0x10a to 0x0' >&2; kill -6 $$")
    choice = await probe.chosen("auto", binary=qemu, device=Path("/dev/null"), cpuinfo=capable)
    assert choice.accel == "tcg"
    assert choice.reason == "KVM does not work here: error: failed to set MSR 0x10a to 0x0"
    with pytest.raises(AccelError, match=r"KVM was asked for, but it does not work here: .*MSR 0x10a"):
        await probe.chosen("kvm", binary=qemu, device=Path("/dev/null"), cpuinfo=capable)


async def test_where_kvm_was_asked_for_the_cheap_sign_says_more_than_qemu(tmp_path: Path) -> None:
    qemu = imitation(tmp_path, "echo 'kvm.c:3183: Assertion failed.' >&2; exit 1")
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu\n")
    with pytest.raises(AccelError, match=r"it does not work here: the CPU offers neither vmx nor svm$"):
        await probe.chosen("kvm", binary=qemu, device=Path("/dev/null"), cpuinfo=tmp_path / "cpuinfo")


async def test_a_guest_that_hangs_is_ended(tmp_path: Path) -> None:
    qemu = imitation(tmp_path, "exec tail -f /dev/null")
    assert (
        await probe.tried("kvm", binary=qemu, timeout=0.3) == "a guest of a few instructions did not end within 0.3 s"
    )


async def test_kvm_without_a_device_is_refused_at_once(tmp_path: Path) -> None:
    qemu = imitation(tmp_path, "exit 85")
    with pytest.raises(AccelError, match="cannot be opened: there is none"):
        await probe.chosen("kvm", binary=qemu, device=tmp_path / "none")
    assert starts(tmp_path) == 0


async def test_the_answer_is_remembered_for_this_boot_and_this_qemu(tmp_path: Path, capable: Path) -> None:
    cache = tmp_path / "accel.json"
    qemu = imitation(tmp_path, "echo 'qemu: no luck' >&2; exit 1")

    async def ask() -> str:
        choice = await probe.chosen("auto", binary=qemu, cache=cache, device=Path("/dev/null"), cpuinfo=capable)
        return choice.reason

    assert [await ask(), await ask()] == ["KVM does not work here: no luck"] * 2
    assert starts(tmp_path) == 1
    content = json.loads(cache.read_text())
    # another boot
    cache.write_text(json.dumps({**content, "key": ["other", *content["key"][1:]]}))
    await ask()
    assert starts(tmp_path) == 2
    # another QEMU
    os.utime(qemu, (1, 1))
    await ask()
    assert starts(tmp_path) == 3
    for damaged in ("", "[]", "{}", '{"key": 1, "failure": 2}'):
        cache.write_text(damaged)
        assert await ask() == "KVM does not work here: no luck"
    assert starts(tmp_path) == 7
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


async def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, capable: Path) -> None:
    qemu = imitation(tmp_path, f"exit {probe.EXIT_STATUS}")
    choice = await probe.chosen(
        "auto", binary=qemu, cache=tmp_path / "none" / "cache", device=Path("/dev/null"), cpuinfo=capable
    )
    assert choice.accel == "kvm"


@pytest.mark.deadline(20)
async def test_the_probe_s_guest_really_runs_under_qemu() -> None:
    assert await probe.tried("tcg", binary=QEMU) is None


@pytest.mark.parametrize(("mode", "allowed"), [(0o600, False), (0o660, False), (0o666, True)])
def test_a_device_that_is_not_for_qemu_s_uid_is_no_kvm(tmp_path: Path, mode: int, allowed: bool) -> None:
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(mode)
    choice = AccelChoice(accel="kvm", reason="a guest ran with it")
    config = VmConfig(
        name="vm",
        directory=tmp_path,
        kernel=Kernel(path=Path("/guest/vmlinux")),
        memory=Memory(size_mib=128),
        confinement=Confinement(uid=1900000001, gid=1900000001),
    )
    auto, asked = (replace(config, accel=accel) for accel in ("auto", "kvm"))
    if allowed:
        assert probe.permitted(choice, asked, device=device) == choice
        return
    assert probe.permitted(choice, auto, device=device).accel == "tcg"
    with pytest.raises(AccelError, match=r"KVM was asked for, but .* is not for uid 1900000001"):
        probe.permitted(choice, asked, device=device)
    assert probe.permitted(choice, replace(asked, confinement=None), device=device) == choice
    ours = os.stat(device).st_gid
    grouped = replace(asked, confinement=Confinement(uid=1900000001, gid=1900000001, groups=(ours,)))
    if mode == 0o660:
        assert probe.permitted(choice, grouped, device=device) == choice
