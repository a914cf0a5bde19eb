"""Linux capabilities: their names, the default set, and what adding and dropping makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmsandbox.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: by number, as the kernel knows them
KNOWN = tuple(
    f"CAP_{name}"
    for name in [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "LINUX_IMMUTABLE",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_ADMIN",
        "NET_RAW",
        "IPC_LOCK",
        "IPC_OWNER",
        "SYS_MODULE",
        "SYS_RAWIO",
        "SYS_CHROOT",
        "SYS_PTRACE",
        "SYS_PACCT",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_NICE",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "MKNOD",
        "LEASE",
        "AUDIT_WRITE",
        "AUDIT_CONTROL",
        "SETFCAP",
        "MAC_OVERRIDE",
        "MAC_ADMIN",
        "SYSLOG",
        "WAKE_ALARM",
        "BLOCK_SUSPEND",
        "AUDIT_READ",
        "PERFMON",
        "BPF",
        "CHECKPOINT_RESTORE",
    ]
)

#: what docker gives every container
DEFAULT = frozenset(
    f"CAP_{name}"
    for name in [
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    ]
)

ALL = "ALL"


def adjusted(add: Sequence[str] = (), drop: Sequence[str] = (), *, privileged: bool = False) -> tuple[str, ...]:
    """The capabilities a container gets, in the kernel's order.

    Names may be in any case and without ``CAP_``.  ``ALL`` on one side makes that side the starting point, so that the
    other makes exceptions from it; named on both sides, a capability is dropped.  `privileged` starts from all.

    Raises InvalidArgumentError for an unknown name.
    """
    added = [_named(name, "add") for name in add]
    dropped = [_named(name, "drop") for name in drop]
    if ALL in dropped and ALL not in added:
        chosen = set(added)
    else:
        chosen = set(KNOWN) if privileged or ALL in added else set(DEFAULT)
        chosen.update(added)
        chosen.difference_update(dropped)
        if ALL in dropped:
            chosen.clear()
    return in_order(chosen)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """`names` by their number, unknown ones left out."""
    wanted = set(names)
    return tuple(name for name in KNOWN if name in wanted)


def among(names: Iterable[str]) -> tuple[str, ...]:
    """Those of an OCI document's that there are, in the kernel's order; they may be in any case."""
    return in_order(name.upper() for name in names)


def complaints(process: object) -> list[str]:
    """What is to be said of capabilities of an OCI process that no kernel has, and that it is therefore not given."""
    sets = process.get("capabilities") if isinstance(process, dict) else None
    named: dict[str, None] = {}
    for names in sets.values() if isinstance(sets, dict) else ():
        named.update((str(name), None) for name in names or () if str(name).upper() not in KNOWN)
    return [f"'process.capabilities' has '{name[:64]}', which is unknown and not given" for name in named]


def _named(text: str, verb: str) -> str:
    name = text.strip().upper()
    if name == ALL:
        return ALL
    if not name.startswith("CAP_"):
        name = f"CAP_{name}"
    if name not in KNOWN:
        import difflib

        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f": did you mean '{near[0]}'?" if near else ""
        raise InvalidArgumentError(f"cannot {verb} capability '{text}': there is none of that name{hint}")
    return name
