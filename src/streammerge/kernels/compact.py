"""A matrix in half the memory of float64, or a symmetric one in a quarter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import torch

STRIP_COLUMNS = 256
_MOST = (1 << 31) - 1
_ROWS = 1 << 10


class Compact:
    """A matrix of 32-bit integers times a step, which each row has for each strip of columns.

    A number is off by at most 2^-32 of the largest of its row in the strip: for a vector of 8192 elements about 1e-9 of its
    length in all, a fortieth of what float32 loses. ``exact``: the numbers are float64 instead. ``lower``: the matrix
    is symmetric, and a strip has only the rows from the diagonal on. All numbers are zero at first.
    """

    def __init__(self, rows: int, columns: int, exact: bool, lower: bool = False) -> None:
        import torch

        self.shape, self.exact, self.lower = (rows, columns), exact, lower
        self.strips = list(ranges(columns, STRIP_COLUMNS))
        dtype = torch.float64 if exact else torch.int32
        self._parts = [torch.zeros(rows - a * lower, b - a, dtype=dtype) for a, b in self.strips]
        self._steps = torch.zeros(len(self.strips), rows, 1, dtype=torch.float64)

    @classmethod
    def over(cls, matrix: torch.Tensor) -> Compact:
        """Returns the numbers of a float64 matrix where they are."""
        made = cls(0, matrix.shape[1], True)
        made.shape = (matrix.shape[0], matrix.shape[1])
        made._parts = [matrix[:, a:b] for a, b in made.strips]
        return made

    def put(self, number: int, values: torch.Tensor, start: int = 0) -> None:
        """Sets the rows from ``start`` on of a strip."""
        for a, b in ranges(len(values), _ROWS):
            some = values[a:b]
            if not self.exact:
                step = some.abs().amax(1, keepdim=True).div_(_MOST)
                self._steps[number, start + a : start + b] = step
                some = (some / step.clamp_(min=1e-300)).round_()
            self._parts[number][start + a : start + b] = some

    def put_rows(self, values: torch.Tensor, start: int) -> None:
        """Sets whole rows from ``start`` on."""
        for number, (a, b) in enumerate(self.strips):
            self.put(number, values[:, a:b], start)

    def get(self, number: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Returns rows of a strip in float64. They are not to be changed."""
        import torch

        part = self._parts[number]
        if self.exact:
            return part[start:stop]
        stop = len(part) if stop is None else stop
        return part[start:stop].to(torch.float64).mul_(self._steps[number, start:stop])

    def product(self, matrix: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Returns rows ``start`` to ``stop`` times a matrix of float64."""
        import torch

        made = torch.zeros(stop - start, matrix.shape[1], dtype=torch.float64)
        for number, (a, b) in enumerate(self.strips):
            made.addmm_(self.get(number, start, stop), matrix[a:b])
        return made

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """Returns a symmetric matrix, of which this has the lower half, times a matrix of float64."""
        import torch

        made = torch.zeros(self.shape[0], matrix.shape[1], dtype=torch.float64)
        for number, (a, b) in enumerate(self.strips):
            part = self.get(number)
            made[a:].addmm_(part, matrix[a:b])
            made[a:b].addmm_(part[b - a :].T, matrix[b:])
        return made

    def gram_rows(self) -> list[torch.Tensor]:
        """Returns the product of the matrix and its transpose, in strips of rows."""
        import torch

        rows = list(ranges(self.shape[0], STRIP_COLUMNS))
        made = [torch.zeros(b - a, self.shape[0], dtype=torch.float64) for a, b in rows]
        for i, (a, b) in enumerate(rows):
            for number in range(len(self.strips)):
                x = self.get(number, a, b)
                for c, d in rows[: i + 1]:
                    made[i][:, c:d].addmm_(x, self.get(number, c, d).T)
            for j, (c, d) in enumerate(rows[:i]):
                made[j][:, a:b] = made[i][:, c:d].T
        return made
