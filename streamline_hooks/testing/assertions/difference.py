"""Find the largest difference between two tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

LOGITS = ("batch", "token", "vocabulary entry")
STATES = ("batch", "token", "feature")

SAME_SUMS: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
)
"""Relative tolerance where the same sums are taken, of tensors of the same shape."""

OTHER_SUMS: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
)
"""Relative tolerance where sums may be taken in another order, as with a cache."""

UNTOUCHED: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}
)
"""Fraction of a token's norm by which it may move where nothing that it is computed from was changed."""


@dataclass(frozen=True)
class Difference:
    """By how much, and where, one tensor differs from another.

    Attributes
    ----------
    size : float
        The largest absolute difference; infinite where one of the two is NaN or infinite and the other is not.
    allowed : float
        What it may be.
    place : tuple of int
        The index of the largest difference.
    got, expected : float
        The two values there.
    axes : tuple of str
        What the indices count.
    """

    size: float
    allowed: float
    place: tuple[int, ...]
    got: float
    expected: float
    axes: tuple[str, ...]

    def __str__(self) -> str:
        named = self.axes if len(self.axes) == len(self.place) else [f"axis {k}" for k in range(len(self.place))]
        where = ", ".join(f"{axis} {index}" for axis, index in zip(named, self.place, strict=True))
        allowed = f"allowed: {self.allowed:.3g}" if self.allowed else "expected: equal to the bit"
        return (
            f"the largest absolute difference is {self.size:.6g}{f' at {where}' if where else ''} "
            f"(got {self.got:.9g}, expected {self.expected:.9g}; {allowed})"
        )


def difference(
    got: Tensor,
    expected: Tensor,
    *,
    real: Tensor | None = None,
    tolerance: float | None = None,
    axes: Sequence[str] = LOGITS,
) -> Difference | str | None:
    """Compare two tensors and their dtypes; return None if they agree.

    Text says why they cannot be compared. Allowed is `tolerance` times (1 + the largest expected absolute value); by
    default that of the dtype, see `SAME_SUMS`; 0 compares bit for bit, up to the sign of a zero. `real`, boolean of the
    shape of the leading axes, selects positions; `axes` names the axes.
    """
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return (
            f"got a {got.dtype} tensor of shape {tuple(got.shape)}, "
            f"expected {expected.dtype} of shape {tuple(expected.shape)}"
        )
    if not got.numel():
        return None
    a, b = got.detach().double(), expected.detach().to(got.device).double()
    counts = torch.ones_like(a, dtype=torch.bool)
    if real is not None:
        counts &= real.to(a.device).bool()[(...,) + (None,) * (a.ndim - real.ndim)]
    finite = counts & torch.isfinite(b)
    for values, whose in ((b, "expected"), (a, "got")):
        if bool((values.isnan() & counts).any()):
            return f"NaN at {_named((values.isnan() & counts).nonzero()[0].tolist(), axes)} of what was {whose}"
    relative = SAME_SUMS.get(got.dtype, 0.0) if tolerance is None else tolerance
    largest = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
    allowed = relative * (1 + largest) if relative else 0.0
    gaps = torch.where(counts & (a != b), (a - b).abs(), 0.0)
    size = float(gaps.max())
    if size <= allowed:
        return None
    place = tuple(int(k) for k in torch.unravel_index(gaps.argmax(), gaps.shape))
    return Difference(size, allowed, place, float(a[place]), float(b[place]), tuple(axes))


def relative_gaps(got: Tensor, expected: Tensor, real: Tensor) -> Tensor:
    """Return the norm of each token's difference relative to the expected token, float64 of shape (batch, tokens).

    It is 0 for tokens outside `real`, and infinite for NaN or if only one of the two is infinite.
    """
    a, b = (x.detach().to(expected.device).double().reshape(*x.shape[:2], -1) for x in (got, expected))
    apart = torch.where(a == b, 0.0, a - b).norm(dim=-1).nan_to_num(nan=torch.inf, posinf=torch.inf)
    norm = torch.where(b.isfinite(), b, 0.0).norm(dim=-1)
    gaps = torch.where(apart > 0, apart / norm, 0.0)  # a token that was zero and no longer is moved infinitely far
    return torch.where(real.to(gaps.device), gaps, 0.0)


def token_difference(
    got: Tensor, expected: Tensor, again: Tensor, real: Tensor, tolerance: float | None, axes: Sequence[str] = STATES
) -> str | None:
    """Compare tokens that must not have changed, each relative to its own norm; return the largest change or None.

    `again` is a second run on the unchanged input: twice its difference from `expected` is allowed in addition to
    `tolerance`, by default that of the dtype, see `UNTOUCHED`. NaN never agrees.
    """
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return (
            f"got a {got.dtype} tensor of shape {tuple(got.shape)}, "
            f"expected {expected.dtype} of shape {tuple(expected.shape)}"
        )
    for values, whose in ((expected, "expected"), (got, "got")):
        bad = values.isnan() & real.to(values.device)[(...,) + (None,) * (values.ndim - 2)]
        if bool(bad.any()):
            return f"NaN at {_named(bad.nonzero()[0].tolist(), axes)} of what was {whose}"
    noise = 2 * float(relative_gaps(again, expected, real).max())
    if not noise < torch.inf:
        return "two runs on the same input differ without bounds, so that nothing can be told"
    allowed = noise + (UNTOUCHED.get(got.dtype, 0.0) if tolerance is None else tolerance)
    gaps = relative_gaps(got, expected, real)
    size = float(gaps.max())
    if size <= allowed and size < torch.inf:
        return None
    row, token = (int(k) for k in torch.unravel_index(gaps.argmax(), gaps.shape))
    a, b = got[row, token].detach().double(), expected[row, token].detach().to(got.device).double()
    apart = torch.where(a == b, 0.0, a - b).abs()
    inner = tuple(int(k) for k in torch.unravel_index(apart.argmax(), apart.shape))
    return (
        f"the largest absolute difference is {float(apart[inner]):.6g} at {_named((row, token, *inner), axes)} "
        f"(got {float(a[inner]):.9g}, expected {float(b[inner]):.9g}), which makes {size:.3g} of that token's norm "
        f"(allowed: {allowed:.3g})"
    )


def require_same(
    got: Tensor,
    expected: Tensor,
    what: str,
    cause: str,
    *,
    real: Tensor | None = None,
    tolerance: float | None = None,
    axes: Sequence[str] = LOGITS,
) -> None:
    """Raise AssertionError if two tensors differ; `what` begins the message, and `cause` names the likely cause."""
    found = difference(got, expected, real=real, tolerance=tolerance, axes=axes)
    if found is not None:
        raise AssertionError(f"{what}: {found}. Likely cause: {cause}.")


def _named(place: Sequence[int], axes: Sequence[str]) -> str:
    names = axes if len(axes) == len(place) else [f"axis {k}" for k in range(len(place))]
    return ", ".join(f"{name} {index}" for name, index in zip(names, place, strict=True))
