"""Messages between processes: cut at any byte, with errors and their causes, and with tensors bit for bit."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import threading

import pytest
import torch
from conftest import assert_same

import streammerge as sm
from running.executors.toys import Odd
from streammerge.running.executors.messages import (
    RESULT,
    UNIT,
    Line,
    Received,
    framed,
    pickled,
    pickled_error,
    unpickled_error,
)


@pytest.mark.parametrize("step", [1, 2, 8, 9, 10, 1000])
def test_messages_come_whole_however_they_are_cut(step: int) -> None:
    sent = [(UNIT, b""), (RESULT, b"x" * 300), (UNIT, b"yz")]
    data = b"".join(framed(*each) for each in sent)
    received, found = Received(), []
    for start in range(0, len(data), step):
        found += received.take(data[start : start + step])
    assert found == sent


def test_a_line_takes_what_is_longer_than_a_buffer() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=Line(theirs).send, args=(RESULT, bytes(5_000_000)))
        sender.start()
        line = Line(ours)
        assert line.receive() == (RESULT, bytes(5_000_000))
        sender.join()
        theirs.close()
        with pytest.raises(EOFError):
            line.receive()


TENSORS = {
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 3),
    "half": torch.tensor([1.0, float("nan"), -0.0]).bfloat16(),
    "view": torch.arange(24).view(4, 6).t()[1:4, ::2],
    "mask": torch.tensor([True, False]),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "large": torch.randn(1001, 77, dtype=torch.float64),
    "sparse": torch.eye(3).to_sparse().to_dense(),
}


def test_tensors_are_the_same_to_the_bit() -> None:
    assert_same(pickle.loads(pickled(TENSORS)), TENSORS)
    assert pickle.loads(pickled(torch.eye(3).to_sparse())).is_sparse
    assert pickle.loads(pickled(torch.ones(2, requires_grad=True))).requires_grad
    pickle.loads(pickled(TENSORS["large"])).add_(1)  # it is writable


def test_a_view_sends_its_own_numbers_only() -> None:
    assert len(pickled(torch.zeros(1_000_000)[:10])) < 1000


def test_errors_come_with_their_causes() -> None:
    def fail() -> None:
        try:
            os.stat("/no/such/file")
        except OSError as error:
            raise sm.TaskError("it failed") from error

    with pytest.raises(sm.TaskError) as caught:
        fail()
    made = unpickled_error(pickled_error(caught.value))
    assert (type(made), str(made)) == (sm.TaskError, "it failed")
    assert (type(made.__cause__), made.__cause__.args[:2]) == (FileNotFoundError, (errno.ENOENT, os.strerror(errno.ENOENT)))  # type: ignore[union-attr]
    assert "in fail" in str(made.__cause__.__cause__)  # type: ignore[union-attr]


def test_an_error_that_cannot_be_pickled_keeps_its_words() -> None:
    made = unpickled_error(pickled_error(Odd("one", "two")))
    assert str(made) == "Odd: one and two"
