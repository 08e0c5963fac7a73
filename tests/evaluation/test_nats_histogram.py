"""Quantiles from bins against those of all the numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks import StreamlineError
from streamline_hooks.evaluation.agreement import NatsHistogram

NATS = st.floats(1e-7, 900.0)


@given(st.lists(NATS, min_size=1, max_size=40), st.lists(NATS, max_size=40), st.floats(0.0, 1.0))
def test_quantiles_are_within_a_bin(first: list[float], second: list[float], share: float) -> None:
    total = NatsHistogram.of(torch.tensor(first, dtype=torch.float64)) + NatsHistogram.of(torch.tensor(second))
    assert sum(total.counts) == len(first) + len(second)
    expected = np.quantile(first + second, share, method="inverted_cdf")
    assert total.quantile(share) == pytest.approx(expected, rel=0.02)


def test_what_is_out_of_range() -> None:
    found = NatsHistogram.of(torch.tensor([0.0, -1e-9, 1e-12, 5e5]))
    assert [found.quantile(q) for q in (0.5, 0.75)] == [0.0, 0.0]
    assert found.quantile(1.0) == pytest.approx(1e3, rel=0.02)
    with pytest.raises(StreamlineError, match="No token was counted"):
        NatsHistogram().quantile(0.5)
