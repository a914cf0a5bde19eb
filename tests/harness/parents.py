"""Machines that pods are forked from: which there are, their keepers, their end; and some that many tests share."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tests.harness.cli import Cli, awaited, title, wait_until_gone
from tests.harness.nurseries import end_nursery
from vmsandbox import records

if TYPE_CHECKING:
    from collections.abc import Iterator

#: how pods are made whose parents are of their own
KINDS = ("private", "shareable", "explicit")
#: seconds after which parents that are shared are told that they are still of use
REFRESHED = 10.0
#: processes of theirs, which outlive the test that has them made
LASTING: set[int] = set()


def directories(run_root: Path) -> list[Path]:
    """Those of parents that this run root has for itself."""
    place = run_root / "o"
    return [] if place.is_symlink() else sorted(path for path in place.glob("*") if path.is_dir())


def keepers(run_root: Path) -> list[psutil.Process]:
    """Who keeps a parent of this run root, be its directory there or not."""
    names = {path.name for path in directories(run_root)}
    found = []
    for process in psutil.process_iter():
        verb, _, name = title(process).rpartition(" ")
        if verb == "vmsandbox parent" and (name in names or _is_open_below(process, f"{run_root}/o/")):
            found.append(process)
    return found


def _is_open_below(process: psutil.Process, place: str) -> bool:
    with suppress(OSError):
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if os.readlink(link).startswith(place):
                    return True
    return False


def offers(run_root: Path) -> list[dict[str, Any]]:
    """What pods know of the parents there are."""
    found = []
    for path in directories(run_root):
        with suppress(FileNotFoundError):
            found.append(json.loads((path / "offer.json").read_text()))
    return found


def await_offers(run_root: Path, count: int = 1) -> list[dict[str, Any]]:
    """The parents, once there are that many."""
    awaited(lambda: len(offers(run_root)) >= count)
    return offers(run_root)


def await_removal(place: Path) -> None:
    """Wait until a keeper has let its parent go."""
    awaited(lambda: not place.exists())


def end_all(run_root: Path) -> None:
    """End the parents of a run root, and have none made any more.

    Before the nursery has gone none can be found for certain: a keeper is called as it is at first.
    """
    end_nursery(run_root)
    for keeper in keepers(run_root):
        with suppress(psutil.NoSuchProcess):
            keeper.terminate()
            wait_until_gone(keeper.pid)


def make(cli: Cli, box: str, kind: str, directory: Path) -> None:
    """Have a pod of this kind wish for a parent."""
    if kind == "explicit":
        cli.ok("pod", "create", "--name", kind)
        cli.ok("run", "--rm", "--pod", kind, box, "true")
        cli.ok("pod", "rm", "-f", kind)
    else:
        volume = ("-v", f"{directory}:/data") if kind == "shareable" else ()
        cli.ok("run", "--rm", *volume, box, "true")


@contextmanager
def keeping(cli: Cli, directory: Path) -> Iterator[None]:
    """Have pods of the command be forked for the block; its configuration is put into the directory."""
    before = cli.config
    cli.config = directory / "parents.toml"
    cli.config.write_text("[sandbox]\nforks = true\n")
    try:
        yield
    finally:
        end_all(cli.run_root)
        cli.config = before


# ---------------------------------------------------------------- shared by many tests


class Standing:
    """Parents of every kind; a data root whose pods are forks of them, or fail.

    Obtain one from `standing`.
    """

    def __init__(self, cli: Cli, box: str, source: Path) -> None:
        self._cli = cli
        self._box = box
        self._source = source
        #: where there is one of each kind
        self._places: dict[str, Path] = {}
        self._states = {path: path.read_bytes() for path in cli.data_root.glob("templates/*/state")}

    @property
    def data_root(self) -> Path:
        return self._cli.data_root

    def cli(self, run_root: Path) -> Cli:
        """The command with a run root of its own, but for the parents."""
        self.stand()
        (run_root / "o").symlink_to(self._cli.run_root / "o")
        return Cli(run_root, self.data_root, boot="fork")

    def stand(self) -> None:
        """Have those made that are not there: whoever is killed while it forks one takes that along."""
        missing = [kind for kind in KINDS if not self._stands(kind)]
        if not missing:
            return
        for state, content in self._states.items():
            write(state, content)
        for kind in missing:
            if (place := self._places.get(kind)) is not None:
                await_removal(place)
            known = set(directories(self._cli.run_root))
            make(self._cli, self._box, kind, self._source)
            await_offers(self._cli.run_root, len(known) + 1)
            (self._places[kind],) = set(directories(self._cli.run_root)) - known
            # Which does not have one made that it has had made just before.
            end_nursery(self._cli.run_root)
        for state, content in self._states.items():
            write(state, bytes(len(content)))
        LASTING.clear()
        for offer in offers(self._cli.run_root):
            LASTING.update((offer["keeper"]["pid"], offer["machine"]["pid"]))

    def _stands(self, kind: str) -> bool:
        try:
            machine = json.loads((self._places[kind] / "offer.json").read_text())["machine"]
        except (KeyError, FileNotFoundError):
            return False
        return records.is_alive(machine["pid"], machine["start_time"])


@contextmanager
def standing(data_root: Path, box: str) -> Iterator[Standing]:
    """Parents of `data_root`'s templates for the block; guest and images are the same."""
    with (
        tempfile.TemporaryDirectory(prefix="vs-") as run,
        tempfile.TemporaryDirectory(prefix="vsd-") as data,
        tempfile.TemporaryDirectory(prefix="vss-") as source,
    ):
        for name in ("guest", "images"):
            Path(data, name).symlink_to(data_root / name)
        copy_templates(data_root, Path(data))
        cli = Cli(Path(run), Path(data))
        cli.config = Path(run, "config.toml")
        cli.config.write_text("[sandbox]\nforks = true\n")
        made = Standing(cli, box, Path(source))
        try:
            with kept(cli.run_root):
                made.stand()
                yield made
        finally:
            LASTING.clear()
            cli.remove_all()
        assert cli.leftovers() == []


def copy_templates(source: Path, target: Path, *keys: str) -> None:
    """Copy a data root's templates, or some of them, into another one, which must not have any."""
    templates = target / "templates"
    templates.mkdir(mode=0o700)
    for saved in (source / "templates").iterdir():
        if saved.is_dir() and not saved.name.startswith(".") and (not keys or saved.name in keys):
            subprocess.run(["cp", "-a", "--sparse=always", saved, templates], check=True)
            for holder in (templates / saved.name / "holders").iterdir():
                holder.unlink()


def write(state: Path, content: bytes) -> None:
    """Change a template's state such that it looks as it was; if it is none every clone fails."""
    known = state.stat()
    with state.open("r+b") as file:
        file.write(content)
    os.utime(state, ns=(known.st_atime_ns, known.st_mtime_ns))


@contextmanager
def kept(run_root: Path) -> Iterator[None]:
    """Have the parents not end for want of pods for the block."""
    over = threading.Event()

    def refresh() -> None:
        while not over.wait(REFRESHED):
            for path in directories(run_root):
                with suppress(FileNotFoundError):
                    os.utime(path / "offer.json")

    thread = threading.Thread(target=refresh, name="refresh parents", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
