"""What remote stores have answered, remembered while a plan is made, so that nothing is asked twice.

Remembered answers are the state of one moment. Later requests are pinned to the versions in them, so an answer that has
become old is noticed, and never gives wrong bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_lock = threading.Lock()
_users = 0
_answers: dict[Hashable, Any] = {}


@contextmanager
def remembering() -> Iterator[None]:
    """While the block runs, answers of remote stores are remembered, for all threads. Blocks may overlap."""
    global _users
    with _lock:
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _answers.clear()


def recalled(question: Hashable, ask: Callable[[], T]) -> T:
    """Returns the remembered answer to a question. Asks, and remembers the answer, if there is none."""
    if question in _answers:
        return _answers[question]  # type: ignore[no-any-return]
    answer = ask()
    remember(question, answer)
    return answer


def known(question: Hashable) -> Any:
    """Returns the remembered answer to a question, None if there is none."""
    return _answers.get(question)


def remember(question: Hashable, answer: Any) -> None:
    """Remembers an answer if a block of :func:`remembering` runs."""
    with _lock:
        if _users:
            _answers[question] = answer


def forget() -> None:
    """Forgets all answers, because something was written."""
    with _lock:
        _answers.clear()
