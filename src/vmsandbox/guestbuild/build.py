"""Builds guests: works out what is to go in, and does only what was not done before.

A guest is made of two parts that others may share, the kernel and the base of the image, and of our own sources.
The keys of the parts and of the guest are hashes of what goes in, the code of this package included; so nothing has to
be invalidated, and a build with nothing new takes a second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from vmsandbox.errors import NotFoundError
from vmsandbox.guestbuild import cmdline, image, kernel, packages, store, tuned, wheels
from vmsandbox.guestbuild.packages import Apt, Package
from vmsandbox.guestbuild.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmsandbox.guestbuild.wheels import Pin
    from vmsandbox.paths import Roots

#: our own packages that the image gets
SOURCES: Final = ("vmsandbox_agent", "vmsandbox_protocol")
#: code that decides what a part looks like
_KERNEL_RECIPE: Final = ("kernel", "modules", "initramfs", "program", "cpio", "elf")
_TUNED_RECIPE: Final = ("tuned",)
_IMAGE_RECIPE: Final = ("image", "initramfs", "program", "placeholder", "elf", "wheels", "packages")


@dataclass(frozen=True)
class Plan:
    """What a guest is made of; `key` is its address in the store."""

    flavour: str
    kernel_package: Package
    kernel_key: str
    base_packages: tuple[Package, ...]
    wheels: tuple[Pin, ...]
    base_key: str
    sources: tuple[Path, ...]
    cmdline: tuple[str, ...]
    key: str


def build(roots: Roots, flavour: str, *, force: bool, stream: TextIO) -> store.Entry:
    """Make the guest with this kernel current, building what is missing (with `force`, everything).

    Progress goes to `stream`.  Raises a `SandboxError` if it cannot be built; nothing is left then.
    """

    def waiting() -> None:
        print("waiting for another build to end", file=stream, flush=True)

    with store.locked(roots, waiting=waiting):
        steps = Steps(stream, roots.guests / "build.log")
        apt = Apt(store.cache(roots))
        try:
            made = plan(apt, flavour)
            if force or not store.is_complete(roots, made.key):
                _make(roots, made, apt, steps, force=force)
        except packages.StaleListsError:
            with steps.step("fetching the lists of packages"):
                packages.update_lists()
            made = plan(apt, flavour)
            if force or not store.is_complete(roots, made.key):
                _make(roots, made, apt, steps, force=force)
        store.select(roots, flavour, made.key)
    return next(entry for entry in store.entries(roots) if entry.key == made.key)


def plan(apt: Apt, flavour: str) -> Plan:
    """What a guest of this flavour would be made of now."""
    if flavour == "tuned":
        kernel_package = tuned.resolve(apt)
        kernel_inputs: dict[str, Any] = {"recipe": _recipe(_TUNED_RECIPE), **tuned.inputs()}
        parameters: tuple[str, ...] = cmdline.MONOLITHIC
    else:
        kernel_package = kernel.resolve(apt)
        kernel_inputs = {"recipe": _recipe(_KERNEL_RECIPE)}
        parameters = cmdline.PACKAGED
    kernel_key = store.key_of({"package": asdict(kernel_package), **kernel_inputs})
    base_packages = tuple(apt.with_dependencies(*image.PACKAGES))
    pins = tuple(wheels.pins(wheels.lock_file().read_text(), image.WHEELS))
    base_key = store.key_of(
        {
            "packages": [asdict(package) for package in base_packages],
            "wheels": [pin.text for pin in pins],
            "recipe": _recipe(_IMAGE_RECIPE),
        }
    )
    sources = tuple(source_directory(name) for name in SOURCES)
    key = store.key_of(
        {
            "flavour": flavour,
            "kernel": kernel_key,
            "base": base_key,
            "sources": [digest_of_tree(source) for source in sources],
            "cmdline": parameters,
            "recipe": _recipe(("build",)),
        }
    )
    return Plan(flavour, kernel_package, kernel_key, base_packages, pins, base_key, sources, parameters, key)


def source_directory(name: str) -> Path:
    """Where one of our own packages is installed, or lies in the checkout."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise NotFoundError(f"package '{name}' is not installed: run 'scripts/setup'")
    return Path(next(iter(spec.submodule_search_locations)))


def digest_of_tree(directory: Path) -> str:
    """A hash of the names and contents of the Python sources below `directory`."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(directory)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _recipe(modules: Iterable[str]) -> str:
    """A hash of the code of modules of this package."""
    here = Path(__file__).parent
    return hashlib.sha256(b"\0".join((here / f"{name}.py").read_bytes() for name in modules)).hexdigest()


def _make(roots: Roots, made: Plan, apt: Apt, steps: Steps, *, force: bool) -> None:
    kernel_part = store.part(roots, "kernel", made.kernel_key)
    base_part = store.part(roots, "base", made.base_key)
    if force or not kernel_part.exists():
        _make_kernel(made, kernel_part, apt, steps)
    if force or not base_part.exists():
        _make_base(roots, made, base_part, apt, steps)
    with store.staging(roots.guests / made.key) as directory, steps.step("making the guest image"):
        files = {"kernel": "vmlinux", "image": "root.erofs"}
        os.link(kernel_part / "vmlinux", directory / "vmlinux")
        if (kernel_part / "initrd.cpio").exists():
            os.link(kernel_part / "initrd.cpio", directory / "initrd.cpio")
            files["initrd"] = "initrd.cpio"
        tree = directory / "tree"
        shutil.copytree(base_part, tree, symlinks=True)
        image.add_sources(made.sources, tree, steps)
        if (kernel_part / "modules").exists():
            shutil.copytree(kernel_part / "modules", tree / "usr/lib/modules")
        image.pack(tree, directory / "root.erofs", steps)
        shutil.rmtree(tree)
        store.write_manifest(
            directory,
            flavour=made.flavour,
            files=files,
            cmdline=list(made.cmdline),
            release=(kernel_part / "release").read_text().strip(),
            versions={
                "kernel": {made.kernel_package.name: made.kernel_package.version},
                "packages": {package.name: package.version for package in made.base_packages},
                "wheels": {pin.name: pin.version for pin in made.wheels},
            },
            parts=[kernel_part.name, base_part.name],
        )


def _make_kernel(made: Plan, part: Path, apt: Apt, steps: Steps) -> None:
    package = made.kernel_package
    with steps.step(f"downloading the kernel ({package.name} {package.version})"):
        (file,) = apt.fetch([package])
    with store.staging(part) as directory:
        scratch = directory / "scratch"
        if made.flavour == "tuned":
            release = tuned.build(file, directory, scratch, steps)
        else:
            with steps.step("taking kernel and modules out of their package"):
                release = kernel.build(file, directory, scratch).release
        shutil.rmtree(scratch)
        (directory / "release").write_text(release + "\n")


def _make_base(roots: Roots, made: Plan, part: Path, apt: Apt, steps: Steps) -> None:
    with steps.step(f"downloading {len(made.base_packages)} packages and {len(made.wheels)} Python libraries"):
        files = apt.fetch(made.base_packages)
        archives = wheels.fetch(list(made.wheels), store.cache(roots), steps)
    with store.staging(part) as directory, steps.step("assembling the base of the guest image"):
        unpacked, libraries, tree = (directory / f".{name}" for name in ("packages", "wheels", "tree"))
        packages.extract(files, unpacked)
        wheels.extract(archives, libraries)
        tree.mkdir()
        image.base(unpacked, libraries, tree, steps)
        shutil.rmtree(unpacked)
        shutil.rmtree(libraries)
        for path in tree.iterdir():
            path.rename(directory / path.name)
        tree.rmdir()
