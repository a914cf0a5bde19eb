from __future__ import annotations

from itertools import product

import pytest

from vmsandbox.errors import InvalidStateError
from vmsandbox.supervisor.lifecycle import TRANSITIONS, Status, advance

STATES: tuple[Status, ...] = ("creating", "created", "running", "paused", "stopped")
VERBS = sorted({verb for _, verb in TRANSITIONS})


@pytest.mark.parametrize(("state", "verb"), list(product(STATES, VERBS)))
def test_a2_a_verb_leads_on_or_is_refused_naming_state_and_verb(state: Status, verb: str) -> None:
    if (state, verb) in TRANSITIONS:
        assert advance("container 'web'", state, verb) == TRANSITIONS[state, verb]
        return
    with pytest.raises(InvalidStateError) as caught:
        advance("container 'web'", state, verb)
    assert str(caught.value) == f"cannot {verb} container 'web': it is {state}"
    assert (caught.value.state, caught.value.wanted) == (state, verb)


def test_every_state_can_be_left_and_a_stopped_one_only_by_starting_again() -> None:
    left = {state for (state, _), after in TRANSITIONS.items() if after != state}
    assert left == set(STATES)
    assert {verb for (state, verb), after in TRANSITIONS.items() if state == "stopped" != after} == {"start"}
