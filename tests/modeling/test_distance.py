"""KL and cosines against plain computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks.modeling.task import Task, reference_outputs, sum_distance


@given(st.integers(1, 70), st.integers(2, 9), st.floats(1e-3, 30.0), st.integers(0, 99))
def test_kl_is_that_of_numpy(count: int, classes: int, scale: float, seed: int) -> None:
    p, q = scale * torch.randn(2, count, classes, generator=torch.Generator().manual_seed(seed)).double()
    a, b = (rows.numpy() - np.logaddexp.reduce(rows.numpy(), axis=1, keepdims=True) for rows in (p, q))
    task = Task("image-classification")
    found = sum_distance(task, reference_outputs(task, p), q)
    assert found == pytest.approx(float((np.exp(a) * (a - b)).sum()), rel=1e-4, abs=1e-5)


@given(st.integers(1, 70), st.integers(2, 9), st.floats(1e-3, 30.0), st.integers(0, 99))
def test_an_embedding_is_compared_whatever_its_length(count: int, features: int, scale: float, seed: int) -> None:
    a, b = torch.randn(2, count, features, generator=torch.Generator().manual_seed(seed))
    task = Task("embedding")
    found = sum_distance(task, reference_outputs(task, scale * a), b)
    wanted = (1 - torch.cosine_similarity(a.double(), b.double(), dim=-1)).sum()
    assert found == pytest.approx(float(wanted), rel=1e-4, abs=1e-4)


def test_embeddings_that_hardly_differ_are_told_apart() -> None:
    """One minus a cosine in float32 would be zero, or noise."""
    a = torch.nn.functional.normalize(torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    b = a + 1e-4 * torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    wanted = float((1 - torch.cosine_similarity(a.double(), b.double(), dim=-1)).sum())
    task = Task("embedding")
    assert sum_distance(task, reference_outputs(task, a), b) == pytest.approx(wanted, rel=1e-2)
