"""Events are plain data that a listener may keep, compare and send to another process."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import typing

import pytest

from streammerge import events


def test_every_event_is_one_that_a_listener_is_told_of() -> None:
    """Type checkers can then say whether a listener handles them all."""
    written = {kind for kind in vars(events).values() if dataclasses.is_dataclass(kind)}
    assert written == set(typing.get_args(events.Event))


@pytest.mark.parametrize("kind", typing.get_args(events.Event))
def test_events_are_plain_data(kind: type) -> None:
    values = [f"v{number}" for number, _ in enumerate(dataclasses.fields(kind))]
    event = kind(*values)
    assert pickle.loads(pickle.dumps(event)) == event
    assert list(dataclasses.asdict(event).values()) == values
    assert hash(event) == hash(kind(*values))
    assert inspect.getdoc(kind)
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, field.name, "changed")
    assert events.quiet(event) is None
