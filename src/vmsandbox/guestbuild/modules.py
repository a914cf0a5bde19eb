"""Kernel modules of the packaged kernel: which depend on which, in which order, and how the guest finds them.

Distribution packages hold no modules.dep (it is made at installation), but every module says in its .modinfo
section what it depends on and which aliases it answers to.  Signatures are cut off: the guest's kernel would spend more
time checking them than on all the rest of loading (hashing ext4 alone costs an emulated guest 0.2 s), and proves
nothing by it, since modules come from the same read-only files as the kernel.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsandbox.errors import NotFoundError
from vmsandbox.guestbuild import elf

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

_SIGNATURE_MARK = b"~Module signature appended~\n"
#: algorithm, hash, kind, lengths of signer and key id, padding, length of the signature
_SIGNATURE_INFO = struct.Struct(">BBBBB3xI")


@dataclass(frozen=True)
class Module:
    """One module as its package has it; names have underscores where file names may have dashes."""

    name: str
    path: Path
    depends: tuple[str, ...]
    aliases: tuple[str, ...]


class Modules:
    """All modules below a ``lib/modules/RELEASE`` directory, and what is built into the kernel."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = {_canonical(path.name): path for path in sorted(directory.rglob("*.ko"))}
        builtin = directory / "modules.builtin"
        lines = builtin.read_text().splitlines() if builtin.exists() else []
        self._builtin = {_canonical(line.rsplit("/", 1)[-1]) for line in lines}

    def module(self, name: str) -> Module | None:
        """The module, or None if it is built in; raises NotFoundError if the kernel does not have it."""
        name = _canonical(name)
        path = self._files.get(name)
        if path is None:
            if name in self._builtin:
                return None
            raise NotFoundError(f"the kernel of the guest has no module '{name}': choose one that has")
        facts = information(path.read_bytes())
        depends = [_canonical(other) for value in facts.get("depends", ()) for other in value.split(",") if other]
        return Module(name, path, tuple(depends), tuple(facts.get("alias", ())))

    def closure(self, names: Iterable[str], *, extra: Mapping[str, tuple[str, ...]] | None = None) -> list[Module]:
        """These modules and all they depend on, each after what it depends on.

        `extra` names dependencies that modules do not tell about because they are resolved by name at run time.
        """
        ordered: dict[str, Module] = {}

        def visit(name: str) -> None:
            name = _canonical(name)
            if name in ordered:
                return
            module = self.module(name)
            if module is None:
                return
            for other in (*module.depends, *(extra or {}).get(name, ())):
                visit(other)
            ordered[name] = module

        for name in names:
            visit(name)
        return list(ordered.values())


def information(data: bytes) -> dict[str, list[str]]:
    """What a module says of itself: ``key=value`` strings of its .modinfo section."""
    facts: dict[str, list[str]] = {}
    for entry in elf.section(data, ".modinfo").split(b"\0"):
        key, found, value = entry.decode("utf-8", "replace").partition("=")
        if found:
            facts.setdefault(key, []).append(value)
    return facts


def without_signature(data: bytes) -> bytes:
    """A module's ELF file without the signature appended to it, if there is one."""
    if not data.endswith(_SIGNATURE_MARK):
        return data
    end = len(data) - len(_SIGNATURE_MARK) - _SIGNATURE_INFO.size
    *_, signer, key, size = _SIGNATURE_INFO.unpack_from(data, end)
    return data[: end - size - signer - key]


def dependency_files(modules: Iterable[Module], root: Path) -> dict[str, str]:
    """The files in which modprobe looks up these modules, which lie at their place below `root`."""
    listed = list(modules)
    by_name = {module.name: module for module in listed}

    def below(name: str) -> list[str]:
        # They are loaded from last to first, so of several mentions the last one counts.
        found: list[str] = []
        for other in by_name[name].depends:
            if other in by_name:
                found += [other, *below(other)]
        return list(dict.fromkeys(reversed(found)))[::-1]

    dependencies, aliases = [], []
    for module in sorted(listed, key=lambda one: one.name):
        paths = [str(by_name[name].path.relative_to(root)) for name in (module.name, *below(module.name))]
        dependencies.append(f"{paths[0]}: {' '.join(paths[1:])}".rstrip() + "\n")
        aliases += [f"alias {alias} {module.name}\n" for alias in module.aliases]
    return {"modules.dep": "".join(dependencies), "modules.alias": "".join(aliases), "modules.symbols": ""}


def _canonical(name: str) -> str:
    return name.removesuffix(".ko").replace("-", "_")
