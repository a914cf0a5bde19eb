"""A machine that lacks something: one clear error each, and nothing is left."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.cli import Cli, Result, kill
from tests.harness.descriptors import limited_to
from tests.harness.guests import broken_image, hanging_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.cloned


@contextmanager
def mounted(options: str) -> Iterator[Path]:
    """A small file system of its own."""
    place = Path(tempfile.mkdtemp(prefix="vs-"))
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=755,{options}", "none", place], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)  # the nursery may be in it, for a while
    finally:
        shutil.rmtree(place)


def check(result: Result, cli: Cli, *said: str, code: int = 125) -> None:
    """One line that says it, and nothing left."""
    assert result.code == code, result
    line = next(line for line in result.stderr.splitlines() if line.startswith("vmsandbox: "))
    for part in said:
        assert part in line, result
    assert "internal error" not in line
    cli("gc", "-q")
    assert cli.leftovers() == []


def test_a_run_root_that_is_read_only(data_root: Path, box: str) -> None:
    with mounted("ro") as place:
        cli = Cli(place / "r", data_root)
        check(cli("run", "--rm", box, "true"), cli, "Read-only file system", str(place))


def test_a_run_root_without_room(data_root: Path, box: str) -> None:
    with mounted("size=16k") as place:
        cli = Cli(place / "r", data_root)
        check(cli("run", "--rm", box, "true"), cli, "No space left on device")


def test_a_data_root_that_is_read_only(data_root: Path, box: str) -> None:
    with mounted("size=64k") as place, tempfile.TemporaryDirectory(prefix="vs-") as run:
        for name in ("guest", "images", "templates"):
            (place / name).mkdir()
            subprocess.run(["mount", "--bind", data_root / name, place / name], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", place / name], check=True)
        (place / "containers").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        cli = Cli(Path(run), place)
        try:
            check(cli("run", "--rm", box, "true"), cli, "Read-only file system", str(place), "choose another")
            for verb in (["image", "rm", box], ["template", "build", "--force"], ["guest", "build"]):
                result = cli(*verb)
                lines = result.stderr.splitlines()
                assert result.code == 1, result
                assert "read-only file system" in lines[0].lower(), result
                assert lines[0].startswith("vmsandbox: ")
        finally:
            for name in ("guest", "images", "templates"):
                subprocess.run(["umount", "--lazy", place / name], check=True)


def fill(place: Path) -> None:
    with suppress(OSError), open(place / "fill", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_run_root_that_fills_up_stops_nothing_from_running_ending_and_being_removed(
    data_root: Path, box: str
) -> None:
    with mounted("size=2m") as place:
        cli = Cli(place / "r", data_root)
        for name in ("stopped", "orphan"):
            cli.ok("run", "-d", "--name", name, box, "sh", "-c", "echo up; exec sleep 1000")
        fill(place)
        refused = cli("exec", "stopped", "true")
        assert (refused.code, "No space left on device; make room" in refused.stderr) == (125, True), refused
        refused = cli("run", "--rm", box, "true")
        assert (refused.code, "No space left on device; make room" in refused.stderr) == (125, True), refused
        assert [row["status"] for row in cli.ps()] == 2 * ["running"]
        kill(int(cli.inspect("orphan")["pod"]["supervisor"]["pid"]))
        assert cli.ok("logs", "orphan") == "up\n"
        assert cli.ok("stop", "-t", "0", "stopped") == "stopped\n"
        assert cli.ok("rm", "-f", "stopped", "orphan") == "stopped\norphan\n"
        cli("gc", "-q")
        assert cli.leftovers() == []


def test_a_data_root_without_room_for_a_writable_layer(data_root: Path, box: str) -> None:
    with mounted("size=32k") as place, tempfile.TemporaryDirectory(prefix="vs-") as run:
        for name in ("guest", "images", "templates"):
            (place / name).symlink_to(data_root / name)
        cli = Cli(Path(run), place)
        check(cli("run", "--rm", box, "true"), cli, "cannot make writable layer", "no space left on device: free some")


def test_a_log_goes_on_when_a_full_data_root_has_room_again(data_root: Path, box: str) -> None:
    with mounted("size=2m") as place, tempfile.TemporaryDirectory(prefix="vs-") as run:
        for name in ("guest", "images", "templates"):
            (place / name).symlink_to(data_root / name)
        cli = Cli(Path(run), place)
        words = ("run", "-i", "--name", "web", box, "cat")
        # Files grow by pages: the first of these still has room, the second has it in part and waits for more.
        room, waits = b"r" * 3000 + b"\n", b"w" * 3000 + b"\n"
        with cli.popen(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            for text in (b"before\n", room, waits, b"lost\n", b"after\n"):
                if text == room:
                    fill(place)
                elif text == b"after\n":
                    (place / "fill").unlink()
                client.stdin.write(text)
                client.stdin.flush()
                # What has come back has been through the log.
                assert client.stdout.readline() == text
            client.stdin.close()
        result = cli("logs", "web")
        assert result.raw == b"before\n" + room + waits + b"after\n", result
        assert "vmsandbox: 5 bytes of output are missing here: the log could not be written: No space" in result.stderr
        cli.ok("rm", "web")
        assert cli.leftovers() == []


@pytest.mark.parametrize(("binary", "said"), [("binary", "cannot use"), ("virtiofsd", "cannot start virtiofsd")])
def test_a_program_that_is_missing(cli: Cli, box: str, tmp_path: Path, binary: str, said: str) -> None:
    cli.config = tmp_path / "config.toml"
    cli.config.write_text(f'[hypervisor]\n{binary} = "/no/such/program"\n')
    result = cli("run", "--rm", "-v", f"{tmp_path}:/data", box, "true")
    check(result, cli, said, "/no/such/program")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[sandbox]\nbase_cpuz = 1\n", ("unknown setting 'sandbox.base_cpuz'", "did you mean 'sandbox.base_cpus'?")),
        ("no toml", ("config.toml' is not TOML", "line 1")),
        (None, ("config.toml' does not exist",)),
    ],
)
def test_a_configuration_that_cannot_be_used(
    cli: Cli, box: str, tmp_path: Path, text: str | None, said: tuple[str, ...]
) -> None:
    cli.config = tmp_path / "config.toml"
    if text is not None:
        cli.config.write_text(text)
    for words in (["run", "--rm", box, "true"], ["create", box, "true"], ["pod", "create", "--name", "p"]):
        code = 1 if words[0] == "pod" else 125
        check(cli(*words), cli, *said, code=code)


@pytest.mark.parametrize("limit", [6, 8, 12, 16, 24])
def test_too_few_descriptors(cli: Cli, box: str, limit: int) -> None:
    check(cli("run", "--rm", box, "true", preexec_fn=limited_to(limit)), cli, "oo many open files")


def test_more_disks_than_a_pod_has_slots(cli: Cli, box: str, tmp_path: Path, pod_template: None) -> None:
    cli.ok("pod", "create", "--name", "p")
    devices = []
    for number in range(48):
        disk = tmp_path / f"{number}.img"
        with disk.open("wb") as file:
            file.truncate(1 << 20)
        devices += ["--device", f"{disk}:/dev/d{number}"]
    result = cli("run", "--rm", "--pod", "p", *devices, box, "true", timeout=300)
    assert result.code == 125, result
    line = next(line for line in result.stderr.splitlines() if line.startswith("vmsandbox: "))
    assert "all 48 root ports are in use: remove a container of the pod, or raise" in line
    assert cli.ps() == []
    assert cli.ok("run", "--rm", "--pod", "p", box, "sh", "-c", "ls /sys/block | grep -c vd") == "3\n"


def lines_of(result: Result) -> tuple[str, str]:
    """The message and what '--debug' adds to it."""
    message, _, detail = result.stderr.partition("\n")
    return message, detail


def test_a_kernel_that_hangs(cli: Cli, box: str, tmp_path: Path) -> None:
    cli.config = tmp_path / "config.toml"
    kernel = hanging_kernel(tmp_path / "kernel")
    cli.config.write_text(f"[guest]\nkernel = '{kernel}'\n[hypervisor]\nboot_timeout = 2\n")
    result = cli("run", "--rm", "--template", "off", box, "true")
    check(result, cli, "the guest's agent did not answer within 2 s (reached: running after ", "the console is empty)")
    message, detail = lines_of(result)
    assert "'hypervisor.boot_timeout'" in message
    assert re.match(r"reached: spawned after [\d.]+ s, .*running after [\d.]+ s\nstderr of QEMU: ", detail), result
    assert "the console is empty" in detail


def test_an_image_that_is_broken(cli: Cli, box: str, tmp_path: Path) -> None:
    cli.config = tmp_path / "config.toml"
    cli.config.write_text(f"[guest]\nimage = '{broken_image(tmp_path / 'image')}'\n")
    result = cli("run", "--rm", "--template", "off", box, "true")
    check(result, cli, "erofs", "vmsandbox: cannot mount the guest image '/dev/vda'; Kernel panic", "(reached: running")
    _, detail = lines_of(result)
    assert "cannot mount the guest image" in detail, "the lines before the kernel's registers and calls"
    # What is often booted first is a machine for a template.
    result = cli("template", "build")
    check(result, cli, "cannot mount the guest image '/dev/vda'; Kernel panic", "(reached: running", code=1)
    assert "last lines of the console:" in lines_of(result)[1]


@pytest.mark.parametrize(("member", "said"), [("kernel", "neither a vmlinux"), ("image", "no erofs")])
def test_a_file_that_is_no_guest(cli: Cli, box: str, tmp_path: Path, member: str, said: str) -> None:
    cli.config = tmp_path / "config.toml"
    (tmp_path / "garbage").write_bytes(bytes(100_000))
    cli.config.write_text(f"[guest]\n{member} = '{tmp_path}/garbage'\n")
    check(cli("run", "--rm", box, "true"), cli, f"'guest.{member}'", said, "correct section 'guest'")
    report = json.loads(cli("check", "--format", "json").stdout)
    (finding,) = [finding for finding in report["findings"] if finding["name"] == "guest"]
    assert (finding["status"], said in finding["detail"]) == ("missing", True)
