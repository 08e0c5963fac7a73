"""The largest difference is found where it is, and only where it counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamline_hooks.core import bitwise_equal
from streamline_hooks.testing.compare import assert_tensors_match, describe_difference, describe_token_difference


@given(st.integers(0, 2), st.integers(0, 3), st.integers(0, 4), st.sampled_from([-1.5, 2.5]), st.booleans())
def test_the_place_and_the_size(row: int, token: int, entry: int, size: float, half: bool) -> None:
    expected = torch.arange(60.0).reshape(3, 4, 5).to(torch.bfloat16 if half else torch.float32)
    got = expected.clone()
    got[row, token, entry] += size
    got[(row + 1) % 3, token, entry] += 0.25
    found = describe_difference(got, expected, tolerance=0.0)
    mine, theirs = float(got[row, token, entry]), float(expected[row, token, entry])
    assert found is not None and f"difference is {abs(mine - theirs):.6g} at" in found
    assert f"at batch {row}, token {token}, vocabulary entry {entry} (got {mine:.9g}, expected {theirs:.9g};" in found


def test_only_real_tokens_count() -> None:
    expected, real = torch.zeros(2, 3, 4), torch.tensor([[True, True, True], [False, True, True]])
    got = expected.clone()
    got[1, 0] = torch.nan
    assert describe_difference(got, expected, real=real, tolerance=0.0) is None
    got[1, 1, 2] = 1.0
    found = describe_difference(got, expected, real=real, tolerance=0.0)
    assert found is not None and "at batch 1, token 1, vocabulary entry 2 (" in found


def test_what_lies_in_the_padding_does_not_widen_the_tolerance() -> None:
    expected, real = torch.zeros(1, 2, 1), torch.tensor([[False, True]])
    expected[0, 0] = 1e9
    got = expected.clone()
    got[0, 1] = 1e-3
    assert "difference is 0.001 at" in str(describe_difference(got, expected, real=real))


@pytest.mark.parametrize("where", ["got", "expected", "both"])
def test_nan_never_agrees(where: str) -> None:
    got, expected = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    for values, name in ((got, "got"), (expected, "expected")):
        if where in (name, "both"):
            values[0, 1, 0] = torch.nan
    said = describe_difference(got, expected, tolerance=10.0)
    assert said is not None and "NaN at batch 0, token 1, vocabulary entry 0" in said


def test_infinity_agrees_with_itself_alone() -> None:
    masked = torch.tensor([[[0.0, -torch.inf]]])
    assert describe_difference(masked, masked.clone()) is None
    found = describe_difference(torch.zeros(1, 1, 2), masked)
    assert "difference is inf at" in str(found)
    found = describe_difference(masked, torch.zeros(1, 1, 2), tolerance=10.0)
    assert "difference is inf at batch 0, token 0, vocabulary entry 1 (" in str(found)


@pytest.mark.parametrize("got", [torch.zeros(1, 2), torch.zeros(1, 3, dtype=torch.float64)], ids=["shape", "dtype"])
def test_what_cannot_be_compared_is_said(got: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match=r"a .* of shape .*expected .*cause: none"):
        assert_tensors_match(got, torch.zeros(1, 3), "It is wrong", "none")


@pytest.mark.parametrize(
    ("dtype", "gap", "agrees"),
    [
        (torch.float32, 1e-5, True),
        (torch.float32, 1e-4, False),
        (torch.bfloat16, 1.6e-2, True),
        (torch.bfloat16, 1e-1, False),
        (torch.float64, 1e-12, True),
        (torch.float64, 1e-8, False),
        (torch.int64, 1, False),
    ],
)
def test_tolerance_goes_by_the_precision(dtype: torch.dtype, gap: float, agrees: bool) -> None:
    expected = torch.ones(1, 1, 1, dtype=dtype)
    assert (describe_difference(expected + gap, expected) is None) == agrees


def test_bits() -> None:
    zero = torch.zeros(2)
    assert bitwise_equal(zero, zero.clone()) and not bitwise_equal(zero, -zero)
    assert not bitwise_equal(zero, zero.double()) and not bitwise_equal(zero, torch.zeros(3))
    nan = torch.tensor([torch.nan])
    assert bitwise_equal(nan, nan.clone()) and bitwise_equal(torch.tensor(True), torch.tensor(True))
    assert bitwise_equal(torch.zeros(0), torch.zeros(0)) and bitwise_equal(torch.ones(2, 3).T, torch.ones(3, 2))


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min])
def test_masked_logits_do_not_widen_the_tolerance(mask: float) -> None:
    """Models mask entries of the vocabulary with the lowest number, and a part of it would allow any difference."""
    expected = torch.zeros(1, 2, 3)
    expected[..., 0] = mask
    got = expected.clone()
    assert describe_difference(got, expected) is None
    real = torch.ones(1, 2, dtype=torch.bool)
    assert describe_token_difference(got, expected, expected, real, None) is None
    got[0, 1, 2] = 0.5
    assert "at batch 0, token 1, vocabulary entry 2" in str(describe_difference(got, expected))
    assert describe_token_difference(got, expected, expected, real, None) is not None
