"""The tuned kernel: built from the distribution's kernel source with our own configuration, without patches.

It is monolithic (no module, no initramfs) and has only what a guest needs, so it boots in half the time; building
it takes a quarter of an hour of CPU time.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmsandbox.errors import NotFoundError
from vmsandbox.guestbuild import elf, packages, steps
from vmsandbox.guestbuild.steps import BuildError

if TYPE_CHECKING:
    from vmsandbox.guestbuild.packages import Apt, Package
    from vmsandbox.guestbuild.steps import Steps

META_PACKAGE: Final = "linux-source"
FRAGMENT: Final = "guest/kernel.config"
#: what has to be installed: a program or a header -> its package
TOOLS: Final = {
    "gcc": "gcc",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "perl": "perl",
    "/usr/include/gelf.h": "libelf-dev",
    "/usr/include/stdio.h": "libc6-dev",
}
#: what a build says of itself instead of who, where and when
_IDENTITY: Final = {"KBUILD_BUILD_USER": "vmsandbox", "KBUILD_BUILD_HOST": "vmsandbox", "KBUILD_BUILD_TIMESTAMP": "@0"}


def fragment() -> Path:
    """Our kernel configuration, in a checkout or in an installed package."""
    package = Path(__file__).resolve().parents[1]
    for directory in (package.parents[1] / "configs", package / "configs"):
        if (directory / FRAGMENT).exists():
            return directory / FRAGMENT
    raise NotFoundError(f"'{FRAGMENT}' is neither in the checkout nor in the installed package")


def resolve(apt: Apt) -> Package:
    """The package of the distribution's kernel source at present."""
    (package,) = apt.exactly(apt.depended_on(META_PACKAGE, r"linux-source-[\d.]+"))
    return package


def inputs() -> dict[str, Any]:
    """What besides the source decides the result: the configuration and the compiler.

    Raises BuildError if what compiling needs is not installed.
    """
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None and not Path(tool).exists()]
    if missing:
        names = " ".join(missing)
        raise BuildError(
            f"the tuned kernel cannot be compiled: run 'apt-get install --no-install-recommends {names}' first"
        )
    return {"fragment": fragment().read_text(), "compiler": steps.output(["gcc", "-dumpfullversion"]).strip()}


def build(package_file: Path, directory: Path, scratch: Path, shown: Steps) -> str:
    """Compile ``vmlinux`` into `directory`; answers the kernel's release."""
    with shown.step("unpacking the kernel source"):
        packages.extract([package_file], scratch)
        (archive,) = (scratch / "usr/src").glob("linux-source-*.tar.xz")
        shown.run(["tar", "-C", scratch, "-xf", archive])
        archive.unlink()
    (source,) = scratch.glob("linux-source-*")
    make: list[str | Path] = ["make", "-C", source, f"-j{os.cpu_count() or 1}", "ARCH=x86_64"]
    with shown.step("configuring the kernel"):
        (source / "guest.config").write_text(fragment().read_text())
        shown.run([*make, "KCONFIG_ALLCONFIG=guest.config", "allnoconfig"], environment=_IDENTITY)
        missing = unmet(fragment().read_text(), (source / ".config").read_text())
        if missing:
            raise BuildError(f"this kernel does not take all of '{FRAGMENT}': {', '.join(missing)}")
    with shown.step("compiling the kernel (a quarter of an hour of CPU time)"):
        shown.run(["nice", "-n", "10", *make, "vmlinux"], environment=_IDENTITY)
    vmlinux = (source / "vmlinux").read_bytes()
    if elf.pvh_entry(vmlinux) is None:
        raise BuildError("the tuned kernel cannot be booted by PVH: 'guest/kernel.config' has to have CONFIG_PVH")
    (directory / "vmlinux").write_bytes(vmlinux)
    return (source / "include/config/kernel.release").read_text().strip()


def unmet(wanted: str, config: str) -> list[str]:
    """The options of a fragment that a finished configuration does not have as asked."""
    lines = set(config.splitlines())
    options = [line.strip() for line in wanted.splitlines() if line.startswith("CONFIG_")]
    return [option for option in options if not _met(option, lines)]


def _met(option: str, lines: set[str]) -> bool:
    name, _, value = option.partition("=")
    if value == "n":
        return not any(line.startswith(f"{name}=") for line in lines)
    return option in lines
