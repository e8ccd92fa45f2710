"""How many threads torch uses, inside the block and after it. That no thread is left: running/test_execution.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from streammerge.tensors.threads import one_torch_thread


@pytest.fixture(autouse=True)
def three() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_one_inside_and_as_before_afterwards() -> None:
    with one_torch_thread():
        assert torch.get_num_threads() == 1
        with one_torch_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_an_error_ends_it_too() -> None:
    with pytest.raises(KeyError), one_torch_thread():
        raise KeyError
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("last", ["first", "second"])
def test_threads_that_overlap_all_leave_with_the_number_of_before(last: str) -> None:
    entered, leave, found = threading.Event(), threading.Event(), []

    def second() -> None:
        with one_torch_thread():
            found.append(torch.get_num_threads())
            entered.set()
            leave.wait(20)
        found.append(torch.get_num_threads())

    other = threading.Thread(target=second)
    with one_torch_thread():
        other.start()
        assert entered.wait(20)
        if last == "first":
            leave.set()
            other.join(20)
    leave.set()
    other.join(20)
    new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    new.start()
    new.join(20)
    assert (torch.get_num_threads(), found) == (3, [1, 3, 3])
