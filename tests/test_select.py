"""Numbers within limits, to the last bit."""

from __future__ import annotations

import torch

from streammerge.select import inside


def test_what_lies_inside_is_found_to_the_last_bit() -> None:
    """Limits a few units in the last place apart, where the middle between them is rounded."""
    make = torch.Generator().manual_seed(0)
    for _ in range(300):
        scale = 2.0 ** int(torch.randint(-5, 5, (1,), generator=make))
        values = (1 + torch.randint(0, 300, (4099,), generator=make) * 2.0**-23) * scale
        first, count = int(torch.randint(0, 295, (1,), generator=make)), int(torch.randint(1, 6, (1,), generator=make))
        low, high = (1 + first * 2.0**-23) * scale, (1 + (first + count) * 2.0**-23) * scale
        _, places = inside(values, low, high, torch.empty(4099))
        assert torch.equal(places.sort().values, ((values >= low) & (values <= high)).nonzero()[:, 0])
