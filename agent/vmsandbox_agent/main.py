"""The agent's two lives: PID 1 of the guest, or a service on somebody's machine.

Everything that a template's clones have to do themselves is left to CreateSandbox.  Imports that take long under
emulation come after the machine is set up, so that the console shows how far it got.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import NamedTuple

from vmsandbox_agent import init
from vmsandbox_agent.layout import GUEST_BASE, Layout
from vmsandbox_agent.syscalls import (
    LinuxCalls,
    SharedMachineCalls,
    SystemCalls,
    become_subreaper,
    load_at_fixed_addresses,
)

PORT_NAME = "vmsandbox.agent"
BULK_NAME = "vmsandbox.bulk"
#: seconds for the host's port to appear
_PORT_TIMEOUT = 60.0
#: seconds for the last answers to leave
_GRACE = 2.0
_AGENT_GROUP = "/agent"
#: memory that containers cannot take away from the agent
_AGENT_MEMORY = 64 * 1024 * 1024


class Settings(NamedTuple):
    """How to run."""

    layout: Layout
    calls: SystemCalls
    parent_group: str
    socket: Path | None = None
    #: an open port, -1 for none
    port: int = -1
    port_name: str = ""
    #: the same of the port for bulk stdio
    bulk: int = -1
    bulk_name: str = ""
    vsock_port: int = 0
    #: when the first line of ours was executed, since the kernel's start
    began_us: int = 0
    #: what service mode must not touch
    shm: Path = Path("/dev/shm")
    owns_network: bool = False


def main(arguments: list[str] | None = None, *, began_us: int = 0) -> int:
    """Run as PID 1, or with ``service --state DIR --socket PATH [--port-fd FD] [--bulk-fd FD] [--group GROUP]``.

    `began_us` is when the launcher began, in microseconds since the kernel's start.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if os.getpid() == 1 and not arguments:
        return _be_init(began_us)
    if not arguments or arguments[0] != "service":
        usage = "usage: agent service --state DIR --socket PATH [--port-fd FD] [--bulk-fd FD] [--group GROUP]"
        print(usage, file=sys.stderr)
        return 2
    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    base = Path(options["--state"])
    settings = Settings(
        layout=Layout(base),
        calls=SharedMachineCalls(),
        parent_group=options.get("--group", "/vmsandbox-agent"),
        socket=Path(options["--socket"]),
        port=int(options.get("--port-fd", "-1")),
        bulk=int(options.get("--bulk-fd", "-1")),
        shm=base / "shm",
    )
    become_subreaper()
    return _serve(settings)


def _be_init(began_us: int) -> int:
    """Never returns: the kernel panics when PID 1 ends."""
    calls = LinuxCalls()
    try:
        os.umask(0o022)
        os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
        init.mount_everything(calls)
        layout = Layout(GUEST_BASE)
        init.survive_containers(calls, layout.etc)
        init.raise_loopback()
        parameters = init.parameters(Path("/proc/cmdline").read_text())
        if parameters.get("emulated") == "1":
            load_at_fixed_addresses()
        _serve(
            Settings(
                layout=layout,
                calls=calls,
                parent_group="/containers",
                port_name=PORT_NAME,
                bulk_name=BULK_NAME,
                vsock_port=int(parameters.get("vsock", "0")),
                owns_network=True,
                began_us=began_us,
            )
        )
    except BaseException:
        traceback.print_exc()
        print("vmsandbox-agent: fatal error, switching off", file=sys.stderr, flush=True)
    finally:
        calls.power_off()
        signal.pause()
    return 1


def _serve(settings: Settings) -> int:
    from vmsandbox_agent import cgroup, devices, machine
    from vmsandbox_agent.crun import Crun
    from vmsandbox_agent.network import Network
    from vmsandbox_agent.reaper import Reaper
    from vmsandbox_agent.sandbox import Sandbox
    from vmsandbox_agent.storage import Storages

    started_us = machine.since_boot_us()
    layout = settings.layout
    layout.make()
    cgroups = cgroup.detect()
    cgroups.prepare(settings.parent_group)
    if os.getpid() == 1 and isinstance(cgroups, cgroup.UnifiedCgroups):
        cgroups.protect(_AGENT_GROUP, _AGENT_MEMORY)
    reaper = Reaper()
    reaper.start()
    crun = Crun(reaper, layout.crun)
    sandbox = Sandbox(
        layout,
        settings.calls,
        reaper=reaper,
        crun=crun,
        cgroups=cgroups,
        storages=Storages(layout.base, settings.calls),
        parent_group=settings.parent_group,
        shm=settings.shm,
        network=Network() if settings.owns_network else None,
    )
    the_machine = machine.Machine(crun_version=crun.version)
    the_machine.phases_us = {"kernel": settings.began_us or started_us, "agent": started_us}

    from vmsandbox_agent import link, service
    from vmsandbox_agent.bulk import Bulk
    from vmsandbox_agent.rpc import Methods

    finished = threading.Event()
    methods = Methods()
    service.register(
        methods,
        sandbox,
        the_machine,
        lambda power_off: finished.set() if power_off else None,
        Bulk(lambda: _bulk_port(settings)),
    )
    endpoints: list[link.Endpoint] = []
    if settings.socket is not None:
        from vmsandbox_agent.server import ServedSocket

        endpoints.append(ServedSocket.at_path(settings.socket, methods.connection))
    if settings.port_name:
        found = devices.wait_for(
            lambda: devices.port_named(settings.port_name), f"port '{settings.port_name}'", timeout=_PORT_TIMEOUT
        )
        endpoints.append(link.ServedPort.opened(found, methods.connection))
    if settings.port >= 0:
        os.set_blocking(settings.port, False)
        os.set_inheritable(settings.port, False)
        endpoints.append(link.ServedPort(settings.port, methods.connection))
    if settings.vsock_port:
        from vmsandbox_agent.server import ServedSocket

        endpoints.append(ServedSocket.at_vsock(settings.vsock_port, methods.connection))
    the_machine.phases_us["serving"] = machine.since_boot_us()
    for endpoint in endpoints:
        endpoint.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: finished.set())
    print("vmsandbox-agent: serving", file=sys.stderr, flush=True)
    finished.wait()
    for endpoint in endpoints:
        endpoint.drain(_GRACE)
    return 0


def _bulk_port(settings: Settings) -> int:
    """The port for bulk stdio, opened when it is first wanted; raises OSError if there is none."""
    from vmsandbox_agent import devices, link

    if settings.bulk_name:
        found = devices.port_named(settings.bulk_name)
        if found is not None:
            return link.opened(found)
    if settings.bulk < 0:
        raise OSError("no port for bulk stdio")
    os.set_blocking(settings.bulk, False)
    os.set_inheritable(settings.bulk, False)
    return settings.bulk
