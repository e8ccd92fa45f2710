"""One model unchanged, or scaled."""

from __future__ import annotations

from methods.suite import Case, MethodSuite


class TestExact(MethodSuite):
    ORACLES = {
        "copy": lambda x, b, draws: x[0],
        "passthrough": lambda x, b, draws, scale=(1.0,): x[0] * scale[0],
    }
    CASES = [
        Case("copy", 1),
        Case("passthrough", 1, {"scale": [0.5]}, keeps_equals=False),
    ]
