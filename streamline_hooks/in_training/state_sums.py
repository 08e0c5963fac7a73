"""Sums over the hidden states of a training step, and the measurement computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamline_hooks.errors import StreamlineError
from streamline_hooks.in_training.measurement import Measurement, told
from streamline_hooks.precision import widest
from streamline_hooks.statistics.norms import CELLS, median_norm, norm_histogram
from streamline_hooks.statistics.profile import MASSIVE


class NormSums:
    """The norms of the states at one boundary.

    `added`, float64 of shape (3,), sums tokens, tokens with a state that is not finite, and norms; `largest` is the
    greatest norm, (1,); `histogram` is a `norm_histogram`, (1, `CELLS`).
    """

    def __init__(self, device: torch.device) -> None:
        self.added = torch.zeros(3, dtype=widest(device), device=device)
        self.largest = torch.zeros(1, device=device)
        self.histogram = torch.zeros(1, CELLS, dtype=torch.int64, device=device)

    def update(self, norm: Tensor, real: Tensor) -> None:
        """Add the norms of a batch, float32, of which `real` says which count; both of shape (batch, tokens)."""
        finite = norm.isfinite()
        counted, norm = real & finite, torch.where(real & finite, norm, 0.0)
        self.added.add_(torch.stack([real.sum(), (real & ~finite).sum(), norm.sum(dtype=self.added.dtype)]))
        self.largest.copy_(torch.maximum(self.largest, norm.max()))
        self.histogram.add_(norm_histogram(norm.reshape(-1, 1), counted.flatten()))

    def zero(self) -> None:
        """Begin anew."""
        for sums in (self.added, self.largest, self.histogram):
            sums.zero_()


class ChangeSums:
    """How one block changes the states of its tokens.

    `added`, float64 of shape (3,), sums tokens with finite states, cosines, and ‖leaving − entering‖/‖entering‖. A
    token that enters with zeros has cosine 0 and change 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.added = torch.zeros(3, dtype=widest(device), device=device)

    def update(self, entering: Tensor, leaving: Tensor, real: Tensor) -> None:
        """Add a batch: two states of shape (batch, tokens, features), float32, and which tokens count."""
        before, after = norms_of(entering), norms_of(leaving)
        scale = torch.where(before > 0, before, 1.0)
        cosine = (entering * leaving).sum(dim=-1) / scale / torch.where(after > 0, after, 1.0)
        change = torch.where(before > 0, norms_of(leaving - entering) / scale, 0.0)
        counted = real & cosine.isfinite() & change.isfinite()
        summed = [
            torch.where(counted, values, 0.0).sum(dtype=self.added.dtype)
            for values in (cosine.clamp(-1.0, 1.0), change)
        ]
        self.added.add_(torch.stack([counted.sum().to(self.added.dtype), *summed]))

    def zero(self) -> None:
        """Begin anew."""
        self.added.zero_()


def norms_of(state: Tensor) -> Tensor:
    """The norm of each token's state, of shape (batch, tokens)."""
    return torch.linalg.vector_norm(state, dim=-1)


def summed(
    norms: Sequence[NormSums],
    changes: Sequence[ChangeSums],
    squares: Sequence[float | None],
    *,
    step: int,
    grad_scale: float,
    dead: float,
    group: Any = None,
) -> Measurement:
    """Reduce the sums of a step over all ranks of `group` and turn them into a measurement.

    `norms` and `squares` (summed squared gradients) have one entry per boundary, `changes` one per block; gradients are
    divided by `grad_scale`; blocks with a mean change up to `dead` are dead. Raise if no token was counted.
    """
    home = norms[0].added.device
    added = torch.stack([sums.added.to(home) for sums in norms])
    changed = torch.stack([sums.added.to(home) for sums in changes])
    gradient = torch.tensor([[s or 0.0, float(s is not None)] for s in squares], dtype=widest(home), device=home)
    histogram = torch.cat([sums.histogram.to(home) for sums in norms])
    largest = torch.cat([sums.largest.to(home) for sums in norms])
    processes = _merge(added, changed, gradient, histogram, largest=largest, group=group)
    if not bool((added[:, 0] > 0).any()):
        raise StreamlineError(
            f"Step {step} was to be measured, but no forward with a graph called the blocks and counted a token. Open "
            "the monitor before the model is compiled (hooks added afterwards silently never fire), call the model "
            "that it was made for and not a copy (nn.DataParallel runs copies), and call step() once after each "
            "optimiser step."
        )
    tokens, odd, norm_sums = added.cpu().unbind(dim=1)
    cosine = (changed[:, 1] / changed[:, 0]).cpu()
    change = (changed[:, 2] / changed[:, 0]).cpu()
    median, largest = median_norm(histogram.cpu()), largest.cpu()
    finite = tokens - odd
    # Each process's loss is a mean over its own tokens, of which the processes' gradients are averaged.
    total = (gradient[:, 0].sqrt() / (grad_scale * processes)).cpu()
    passed = (gradient[:, 1] > 0).tolist()
    return Measurement(
        step=step,
        tokens=int(tokens.max()),
        cosine=_told(cosine),
        influence=_told(1.0 - cosine),
        change=_told(change),
        norm=_told(norm_sums / finite),
        median_norm=_told(torch.where(finite > 0, median, torch.nan)),
        largest_norm=_told(torch.where(finite > 0, largest.double(), torch.nan)),
        gradient_norm=tuple(told(v) if there else None for v, there in zip(total.tolist(), passed, strict=True)),
        massive=_births(largest > MASSIVE * median, finite > 0),
        dead=_places(change <= dead),
        not_finite=_places(odd > 0),
    )


def _merge(*sums: Tensor, largest: Tensor, group: Any) -> int:
    """Add up over the processes, in place; give how many they are."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size(group) == 1:
        return 1
    for values in sums:
        distributed.all_reduce(values, group=group)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=group)
    return distributed.get_world_size(group)


def _births(massive: Tensor, known: Tensor) -> tuple[int, ...]:
    """The blocks at whose exit the state is massive, and was not at the last place before it that is known."""
    births, before = [], True
    for place, (now, there) in enumerate(zip(massive.tolist(), known.tolist(), strict=True)):
        if there:
            if now and not before:
                births.append(place - 1)
            before = now
    return tuple(births)


def _told(values: Tensor) -> tuple[float | None, ...]:
    return tuple(told(value) for value in values.tolist())


def _places(chosen: Tensor) -> tuple[int, ...]:
    return tuple(int(k) for k in chosen.nonzero().flatten())
