"""A container of a bundle while it exists: how it is made in the guest, known again, and given processes."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import InvalidBundleError
from vmsandbox.oci import cpusets, translate
from vmsandbox.supervisor import shares
from vmsandbox.supervisor.container import CREATE_TIMEOUT, Container
from vmsandbox_protocol import agent_pb2 as pb

if TYPE_CHECKING:
    from vmsandbox.oci.translate import Translated
    from vmsandbox.supervisor.sandbox import Sandbox, Surroundings

#: in the documents of these containers
KIND = "bundle"


def demand_of(resources: dict[str, Any]) -> dict[str, Any]:
    """What LinuxResources ask of the machine, as documents say it; 0 is no limit."""
    cpu, memory = resources.get("cpu") or {}, resources.get("memory") or {}
    quota, period = int(cpu.get("quota") or 0), int(cpu.get("period") or 100_000)
    return {
        "cpus": quota / period if quota > 0 else 0,
        "memory": max(0, int(memory.get("limit") or 0)),
    }


def host_cpus(resources: dict[str, Any]) -> list[int]:
    """The processors of the host that LinuxResources name, checked against those that there are."""
    text = str((resources.get("cpu") or {}).get("cpus") or "")
    wanted = cpusets.parse(text, name="linux.resources.cpu.cpus")
    missing = sorted(wanted - os.sched_getaffinity(0))
    if missing:
        raise InvalidBundleError(
            f"'linux.resources.cpu.cpus' is '{text[:64]}': this host has no processor {missing[0]}"
        )
    return sorted(wanted)


class BundleContainer(Container):
    """A container whose root and mounts are the host's."""

    async def create_bundle(self, sandbox_ready: asyncio.Future[Sandbox], parts: Translated) -> None:
        """Make the container in the guest; on failure nothing of it is left."""
        try:
            shared_dir = self.around.paths.shared_dir
            await shares.bind(shared_dir, self.shared)
            self.stack.push_async_callback(shares.unbind, shared_dir, self.shared.names)
            sandbox = await asyncio.shield(sandbox_ready)
            began = time.monotonic()
            await sandbox.give(self.id, self.demand())
            self.stack.push_async_callback(sandbox.take_back, self.id)
            await sandbox.shares.attach(self.shared.shared_fs, user=self.id)
            self.stack.push_async_callback(sandbox.shares.detach, self.shared.shared_fs, user=self.id)
            names = self.shared.names
            spec = parts.completed(lambda source: f"{self.shared.mount_point}/{names[source]}")
            request = pb.CreateContainerRequest(
                container_id=self.id,
                spec_json=json.dumps(spec).encode(),
                storages=self.shared.storages(),
                stdio=self.stdio(),
            )
            attached = time.monotonic()
            answer = await sandbox.agent.create_container(request, timeout=CREATE_TIMEOUT)
            self.stack.push_async_callback(self._remove_in_guest, sandbox)
            self.document["phases"] = {
                "attach": round(attached - began, 4),
                "create": round(time.monotonic() - attached, 4),
                **{f"guest_{phase}": micros / 1e6 for phase, micros in answer.phases_us.items()},
            }
        except BaseException:
            await self.release()
            raise


def container_of(around: Surroundings, document: dict[str, Any]) -> Container:
    """The container of a document that an earlier supervisor wrote."""
    return (BundleContainer if document.get("kind") == KIND else Container)(around, document)


def exec_request(request: dict[str, Any], document: dict[str, Any]) -> pb.ExecRequest:
    """What the agent is asked for when an engine adds a process that it describes completely."""
    given = request["process"]
    # Late, because pods that no engine makes have nothing for pydantic to check.
    from vmsandbox.oci.document import checked
    from vmsandbox.oci.spec import Process

    process = checked(Process, json.dumps(given).encode(), name="process")
    if not process.args:
        raise InvalidBundleError("process is not valid: 'args' is empty: there is no program to run")
    columns, rows = request.get("size") or (0, 0)
    return pb.ExecRequest(
        container_id=document["id"],
        exec_id=str(request.get("exec")),
        process_json=json.dumps(translate.guest_process(process, given)).encode(),
        stdio=pb.Stdio(
            terminal=process.terminal,
            columns=columns,
            rows=rows,
            stdin=True,
            stdout=True,
            stderr=not process.terminal,
        ),
        ignore_paused=bool(request.get("ignore_paused")),
    )
