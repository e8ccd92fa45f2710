"""The results of a method's passes, so that the method can be bound again elsewhere without a second look at the tensor.

A kernel is a closure and cannot be sent to another process. What a method learns of the whole tensor is small and can be: a
worker that has it makes the same kernel itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from streammerge.kernels.chunk import T


class PassResults:
    """Pickled results of passes, in the order in which the method makes them."""

    def __init__(self, results: Iterable[bytes] = ()) -> None:
        self.results = [*results]
        self._taken = 0

    def next(self, run: Callable[[], T]) -> T:
        """The result of the method's next pass: the recorded one, or what ``run`` returns, which is then recorded."""
        import pickle

        if self._taken < len(self.results):
            result: T = pickle.loads(self.results[self._taken])
        else:
            result = run()
            self.results.append(pickle.dumps(result, pickle.HIGHEST_PROTOCOL))
        self._taken += 1
        return result
