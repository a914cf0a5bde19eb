"""Waiting for a guest's agent to answer for the first time, or for its machine to end, whichever comes first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from vmsandbox.errors import TimedOutError, UnavailableError
from vmsandbox.supervisor.aio import unless
from vmsandbox.supervisor.translation import reached, translated

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from vmsandbox_hypervisor.api import Vm

T = TypeVar("T")
#: letters of a console's last line that go into a message
LAST_WORDS_MAX = 200


async def death(vm: Vm) -> NoReturn:
    """Turn the end of a machine, which nobody asked for, into an error."""
    status = await vm.wait()
    error = vm.ended()
    if error is not None:
        raise translated(error) from error
    raise UnavailableError(f"the virtual machine ended (QEMU's exit status {status})", detail=vm.evidence())


async def first_answer(vm: Vm, call: Coroutine[Any, Any, T]) -> T:
    """What the agent answers to `call`.

    Raises `TimedOutError` and `UnavailableError` that say how far the machine came, with its evidence as detail.
    """
    died = False

    async def dying() -> NoReturn:
        nonlocal died
        await vm.wait()
        died = True
        await death(vm)

    try:
        return await unless(dying(), call)
    except TimedOutError as error:
        raise TimedOutError(
            f"the guest's agent did not answer within {vm.config.boot_timeout:g} s ({reached(vm.phases)}; "
            f"{_last_words(vm)}): 'hypervisor.boot_timeout' sets the limit",
            detail=vm.evidence(),
        ) from error
    except UnavailableError as error:
        # Of a guest that switched itself off nobody but its console says why.
        words = f"; {_last_words(vm)}" if died and vm.ended() is None else ""
        detail = error.detail or vm.evidence()
        raise UnavailableError(f"{error} ({reached(vm.phases)}{words})", detail=detail) from error


def _last_words(vm: Vm) -> str:
    lines = vm.console().strip().splitlines()
    return f"last on the console: {lines[-1].strip()[:LAST_WORDS_MAX]}" if lines else "the console is empty"
