"""Who watches events is told of each, in order; who does not keep up is made to come again."""

from __future__ import annotations

from vmsandbox_agent.events import _BEHIND, Events, OomKilled


def test_a_watcher_hears_what_was_before_and_then_each_event_in_order() -> None:
    events = Events()
    watcher = events.watch(lambda: [OomKilled("web", 1)])
    for count in (2, 3):
        events.publish(OomKilled("web", count))
    watcher.close()
    assert [event.kills for event in watcher if isinstance(event, OomKilled)] == [1, 2, 3]


def test_a_watcher_that_is_too_far_behind_ends_and_costs_no_more() -> None:
    events = Events()
    watcher = events.watch(list)
    for count in range(2 * _BEHIND):
        events.publish(OomKilled("web", count))
    assert watcher._queue.qsize() == _BEHIND + 1
    assert len([*watcher]) == _BEHIND
