"""``vmsandbox image``: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.unit.images.making import Layout, Member, directory, layout, tar
from vmsandbox.admin.image import main
from vmsandbox.errors import InvalidArgumentError, SandboxError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vmsandbox.paths import Roots
    from vmsandbox.resources.images.document import Image
    from vmsandbox.resources.images.store import ImageStore

    Publish = Callable[..., Image]

LAYER = tar(directory("bin"), Member("bin/sh", data=b"x" * 100))


def test_import_prints_the_id_and_tells_its_steps_on_stderr(
    roots: Roots, store: ImageStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout(tmp_path / "lay", LAYER, name="v1")
    assert main(["import", f"oci:{tmp_path}/lay:v1", "--name", "one", "-t", "two:2"], roots) == 0
    out, err = capsys.readouterr()
    image = store.resolve("one")
    assert out == f"{image.id}\n"
    assert err.splitlines() == [
        "unpacking layer 1 of 1 (0.0 MB)",
        "writing the file system",
        f"image {image.id[:12]} (one:latest, two:2) has 0.0 MB",
    ]
    assert main(["import", "-q", "--format", "json", f"oci:{tmp_path}/lay"], roots) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["names"] == ["lay:v1", "one:latest", "two:2"]
    assert err == ""


@pytest.mark.parametrize("words", ["sh -c 'echo a b'", '["sh", "-c", "echo a b"]'])
def test_a_directory_is_imported_with_its_configuration(
    roots: Roots, store: ImageStore, tmp_path: Path, words: str
) -> None:
    (tmp_path / "root").mkdir()
    options = ["--cmd", words, "--entrypoint", "/init", "-e", "A=b", "--env", "C=d=e", "-w", "/w", "-u", "nobody"]
    assert main(["import", f"rootfs:{tmp_path}/root", "--name", "demo", *options], roots) == 0
    assert store.resolve("demo").config == {
        "Cmd": ["sh", "-c", "echo a b"],
        "Entrypoint": ["/init"],
        "Env": ["A=b", "C=d=e"],
        "WorkingDir": "/w",
        "User": "nobody",
    }


def test_ls_lists_names_ids_and_sizes(
    roots: Roots, store: ImageStore, publish: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    one = publish("one", "two:2", created="2020-01-01T00:00:00Z", image_id="aa")
    other = publish("three", content=b"x" * 1_250_000, created="2021-01-01T00:00:00Z", image_id="bb")
    store.hold(other.id, "c1")
    store.remove("three", force=True)
    assert main(["ls"], roots) == 0
    assert capsys.readouterr().out.splitlines() == [
        "NAME        ID            CREATED     SIZE",
        f"<none>      {other.id[:12]}  2021-01-01  1.2 MB",
        f"one:latest  {one.id[:12]}  2020-01-01  0.0 MB",
        f"two:2       {one.id[:12]}  2020-01-01  0.0 MB",
    ]
    assert main(["ls", "-q"], roots) == 0
    assert capsys.readouterr().out.split() == [other.id, one.id]
    assert main(["ls", "--format", "json"], roots) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(image["id"], image["names"], image["used_by"]) for image in listed] == [
        (other.id, [], ["c1"]),
        (one.id, ["one:latest", "two:2"], []),
    ]


def test_ls_of_nothing_is_no_error(roots: Roots, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"], roots) == 0
    assert main(["ls", "--format", "json"], roots) == 0
    assert capsys.readouterr().out == "NAME  ID  CREATED  SIZE\n[]\n"


def test_ls_names_a_damaged_image_and_lists_the_others(
    roots: Roots, publish: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    publish("broken", content=b"broken").erofs.unlink()
    publish("whole")
    assert main(["ls"], roots) == 0
    out, err = capsys.readouterr()
    assert "whole:latest" in out
    assert "broken" not in out
    assert err.startswith("vmsandbox: image '")
    assert len(err.splitlines()) == 1


def test_inspect_prints_everything(roots: Roots, publish: Publish, capsys: pytest.CaptureFixture[str]) -> None:
    image = publish("one")
    assert main(["inspect", "one", image.id[:6]], roots) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == second
    assert (first["id"], first["config"], first["erofs"]) == (image.id, {"Cmd": ["sh"]}, str(image.erofs))


def test_rm_says_what_went_and_goes_on_after_an_error(
    roots: Roots, publish: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    image = publish("one", "two")
    assert main(["rm", "one", "missing", "two"], roots) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == ["untagged: one:latest", "untagged: two:latest", f"deleted: {image.id}"]
    assert err.startswith("vmsandbox: no image 'missing'")


def test_rm_refuses_an_image_in_use_unless_forced(
    roots: Roots, store: ImageStore, publish: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    image = publish("demo")
    store.hold(image.id, "container1")
    assert main(["rm", "demo"], roots) == 1
    assert "it is in use by container 'container1'" in capsys.readouterr().err
    assert main(["rm", "-f", "demo"], roots) == 0
    assert capsys.readouterr().out == "untagged: demo:latest\n"
    assert store.get(image.id) is not None


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["frobnicate"],
        ["import"],
        ["ls", "--bad"],
        ["ls", "--format", "xml"],
        ["import", "rootfs:/tmp", "--max-size", "lots"],
        ["import", "rootfs:/tmp", "--max-size", "-1"],
        ["import", "rootfs:/tmp", "--max-entries", "1k"],
        ["rm"],
    ],
)
def test_a_command_line_without_sense_names_the_help(roots: Roots, argv: list[str]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^image.*: see 'vmsandbox image.* --help'$"):
        main(argv, roots)
    assert not roots.images.exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["import", "oci:/nowhere"], "there is no directory '/nowhere'"),
        (["import", "alpine"], "'alpine' is not a source of images"),
        (["import", "rootfs:/etc", "--cmd", "a 'b"], "--cmd"),
        (["import", "rootfs:/etc", "--entrypoint", "[1]"], "no list of strings"),
        (["inspect", "demo"], "no image 'demo'"),
        (["inspect", "De mo"], "is not a name for an image"),
        (["rm", "demo"], "no image 'demo'"),
    ],
)
def test_errors_are_one_line_that_says_what_and_why(
    roots: Roots, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    def code() -> int:
        return main(argv, roots)

    if argv[0] == "rm":
        assert code() == 1
        message = capsys.readouterr().err.removeprefix("vmsandbox: ").rstrip("\n")
    else:
        with pytest.raises(SandboxError) as caught:
            code()
        message = str(caught.value)
        assert capsys.readouterr() == ("", "")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(("text", "size"), [("20000", 20_000), ("19k", 19 << 10), ("1M", 1 << 20), ("1GiB", 1 << 30)])
def test_sizes_have_units(roots: Roots, tmp_path: Path, text: str, size: int) -> None:
    layout(tmp_path / "lay", tar(Member("f", data=bytes(min(size, 1 << 22) + 1))))
    argv = ["import", f"oci:{tmp_path}/lay", "--max-size", text]
    if size > 1 << 22:
        assert main(argv, roots) == 0
    else:
        with pytest.raises(SandboxError, match=f"more than {size} bytes"):
            main(argv, roots)


def test_the_configuration_bounds_what_is_imported(
    roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout(tmp_path / "lay", tar(*(Member(f"f{number}") for number in range(10)), Member("g", data=bytes(2 << 20))))
    (tmp_path / "config.toml").write_text("[image]\nmax_entries = 5\n")
    monkeypatch.setenv("VMSANDBOX_CONFIG", str(tmp_path / "config.toml"))
    with pytest.raises(SandboxError, match="more than 5 entries"):
        main(["import", f"oci:{tmp_path}/lay"], roots)
    (tmp_path / "config.toml").write_text("[image]\nmax_size_mib = 1\n")
    with pytest.raises(SandboxError, match="more than 1048576 bytes"):
        main(["import", f"oci:{tmp_path}/lay"], roots)
    assert main(["import", f"oci:{tmp_path}/lay", "--max-size", "10m"], roots) == 0


def test_names_out_of_an_archive_do_not_steer_the_terminal(roots: Roots, tmp_path: Path) -> None:
    layout(tmp_path / "lay", tar(Member("../\x1b[2J\nvmsandbox: all is well")), created="\x1b[2J")
    with pytest.raises(SandboxError) as caught:
        main(["import", f"oci:{tmp_path}/lay"], roots)
    assert r"entry '../\x1b[2J\nvmsandbox: all is well'" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_import_that_is_told_to_end_cleans_up(roots: Roots, tmp_path: Path, number: signal.Signals) -> None:
    made = Layout(tmp_path / "lay")
    made.tag(made.manifest([LAYER, tar(Member("x"))], compression=""))
    code = (
        "import os, signal, sys\n"
        "from vmsandbox.admin.__main__ import main\n"
        "from vmsandbox.resources.images.layer import Layers\n"
        # As at a terminal: a shell has what it runs in the background ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"Layers.finish = lambda self: os.kill(os.getpid(), {int(number)})\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, "-c", code, "--data-root", roots.data, "image", "import", f"oci:{made.path}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 128 + number
    assert "Traceback" not in result.stderr
    assert os.listdir(roots.images / "work") == []
