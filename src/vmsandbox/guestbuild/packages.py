"""Distribution packages: which there are, fetching and unpacking them, with nothing installed.

apt resolves names against an empty system, so that the answer depends on its package lists alone and not on what the
machine has installed.  Packages are kept under their SHA-256 and checked whenever they are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmsandbox.guestbuild import steps
from vmsandbox.guestbuild.steps import BuildError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

#: what has to be installed to build: a program -> its package
TOOLS: Final = {"apt-get": "apt", "apt-cache": "apt", "dpkg-deb": "dpkg"}
#: what decides apt's answers
_APT_STATE = (Path("/var/lib/apt/lists"), Path("/etc/apt"))
_URI = re.compile(r"^'[^']+' (?P<file>\S+) \d+ ?(?P<hash>\S*)$")


class StaleListsError(BuildError):
    """apt does not know a package, or its archive has moved on: its lists have to be fetched."""


@dataclass(frozen=True)
class Package:
    """One version of one package, as apt would fetch it."""

    name: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        return f"{self.name}_{self.sha256[:16]}.deb"


class Apt:
    """Answers and packages, kept in `cache`."""

    def __init__(self, cache: Path) -> None:
        self._packages = cache / "packages"
        self._answers = cache / "apt"
        for directory in (self._packages, self._answers / "archives" / "partial"):
            directory.mkdir(parents=True, exist_ok=True)
        self._options = [
            "-oDir::State::status=/dev/null",
            f"-oDir::Cache={self._answers}",
            "-oDir::Cache::pkgcache=pkgcache.bin",
            "-oDir::Cache::srcpkgcache=srcpkgcache.bin",
            "-oAPT::Sandbox::User=root",
            "-oAPT::Install-Recommends=false",
            "-oAcquire::Retries=3",
        ]

    def with_dependencies(self, *names: str) -> list[Package]:
        """These packages and everything they depend on, sorted by name."""

        def ask() -> list[dict[str, str]]:
            printed = self._ask("apt-get", "-qq", "-y", "--print-uris", "install", *names)
            return self._candidates([file.split("_", 1)[0] for file, _ in _uris(printed)])

        return [Package(**entry) for entry in self._remembered(("with-dependencies", *names), ask)]

    def exactly(self, *names: str) -> list[Package]:
        """These packages alone, sorted by name."""
        return [Package(**entry) for entry in self._remembered(("exactly", *names), lambda: self._candidates(names))]

    def depended_on(self, name: str, pattern: str) -> str:
        """The one package that `name` depends on and whose name matches the regular expression."""

        def ask() -> list[str]:
            shown = self._ask("apt-cache", "show", "--no-all-versions", name)
            depends = [line for line in shown.splitlines() if line.startswith("Depends:")]
            words = [entry.split()[0] for line in depends for entry in line.removeprefix("Depends:").split(",")]
            return [word for word in words if re.fullmatch(pattern, word)]

        found = self._remembered(("depended-on", name, pattern), ask)
        if len(found) != 1:
            raise BuildError(f"package '{name}' depends on {found} and not on one package like '{pattern}'")
        return str(found[0])

    def fetch(self, packages: Iterable[Package]) -> list[Path]:
        """The files of these packages, downloaded unless they are there and intact."""
        listed = list(packages)
        wanted = [package for package in listed if not _intact(self._packages / package.file_name, package.sha256)]
        if wanted:
            with tempfile.TemporaryDirectory(prefix=".download-", dir=self._packages) as name:
                directory = Path(name)
                self._download(wanted, directory)
                for package in wanted:
                    fits = [path for path in directory.glob(f"{package.name}_*.deb") if _intact(path, package.sha256)]
                    if not fits:
                        raise BuildError(f"package '{package.name}' {package.version} was downloaded damaged")
                    fits[0].rename(self._packages / package.file_name)
        return [self._packages / package.file_name for package in listed]

    def _download(self, packages: Sequence[Package], directory: Path) -> None:
        words = [f"{package.name}={package.version}" for package in packages]
        done = subprocess.run(
            ["apt-get", *self._options, "-qq", "download", *words],
            cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            raise BuildError(
                f"cannot download packages: {last}: run 'apt-get update' and try again", detail=done.stderr
            )

    def _candidates(self, names: Sequence[str]) -> list[dict[str, str]]:
        printed = self._ask("apt-get", "-qq", "--print-uris", "download", *names)
        found = []
        for file, digest in _uris(printed):
            name, version, _ = file.split("_")
            kind, _, value = digest.partition(":")
            if kind != "SHA256":
                raise StaleListsError(f"apt knows no SHA-256 of package '{name}'")
            found.append({"name": name, "version": urllib.parse.unquote(version), "sha256": value})
        return sorted(found, key=lambda entry: entry["name"])

    def _ask(self, program: str, *words: str) -> str:
        try:
            return steps.output([program, *self._options, *words])
        except BuildError as error:
            raise StaleListsError(f"apt does not know all packages: {error}", detail=error.detail) from error

    def _remembered(self, question: tuple[str, ...], ask: Callable[[], list[Any]]) -> list[Any]:
        """The answer to a question, asked only if apt's lists or configuration have changed since."""
        state = [_state(root) for root in _APT_STATE]
        digest = hashlib.sha256(json.dumps([question, state]).encode()).hexdigest()[:32]
        path = self._answers / f"answer-{digest}.json"
        try:
            known = json.loads(path.read_text())
            assert isinstance(known, list)
            return known
        except (FileNotFoundError, ValueError):
            answer = ask()
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(answer))
        temporary.rename(path)
        return answer


def extract(files: Iterable[Path], directory: Path) -> None:
    """Unpack packages into `directory`; no script of theirs is run."""
    directory.mkdir(exist_ok=True)
    for file in files:
        steps.output(["dpkg-deb", "--extract", file, directory])


def update_lists() -> None:
    """Fetch apt's package lists."""
    steps.output(
        ["apt-get", "-qq", "-oAcquire::Retries=3", "update"], environment={"DEBIAN_FRONTEND": "noninteractive"}
    )


def _uris(printed: str) -> list[tuple[str, str]]:
    matches = [_URI.match(line) for line in printed.splitlines()]
    return [(match["file"], match["hash"]) for match in matches if match]


def _intact(path: Path, sha256: str) -> bool:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


def _state(root: Path) -> list[tuple[str, int, int]]:
    found = []
    for parent, _, names in os.walk(root):
        for name in names:
            path = os.path.join(parent, name)
            try:
                status = os.stat(path)
            except FileNotFoundError:
                continue
            if name != "lock":
                found.append((path, status.st_size, status.st_mtime_ns))
    return sorted(found)
