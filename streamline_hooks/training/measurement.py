"""Measurements of training steps: sums over batches, their reduction over ranks, and the output file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from streamline_hooks.core import StreamlineError, widest_float
from streamline_hooks.statistics import HISTOGRAM_BINS, MASSIVE_NORM_RATIO, median_of_histogram, norm_histogram

_SERIES = ("cosine", "influence", "change", "norm", "median_norm", "largest_norm", "gradient_norm")
_BLOCKS = ("massive", "dead", "not_finite")


@dataclass(frozen=True)
class Measurement:
    """Statistics of the hidden states of one training step, over all batches of the step.

    A value is None if it is unknown: the block was not called, no state at the boundary is finite, or no gradient
    reached the boundary.

    Attributes
    ----------
    step : int
        Number of the optimizer step, counted from 1.
    tokens : int
        Number of tokens over all ranks. A model that calls its blocks several times per forward counts its tokens once
        per call.
    cosine : tuple of float
        Mean cosine similarity of the states that enter and leave a block; one value per block.
    influence : tuple of float
        Block influence, 1 − cosine (ShortGPT, arXiv 2403.03853, eq. 1); one value per block.
    change : tuple of float
        Mean relative change ‖leaving − entering‖/‖entering‖; one value per block.
    norm, median_norm, largest_norm : tuple of float
        Mean, median and largest norm of the states at each of the L + 1 boundaries: the input of block 0, then the
        output of each block. The median is accurate to 2.2 %.
    gradient_norm : tuple of float
        Norm of the gradient of the loss with respect to all states at a boundary, at each of the L + 1 boundaries.
        Padding contributes 0, except where a padded position predicts the first real token. A skipped block
        (`StochasticDepth`) returns its input. None if one forward had two backwards, or if it is unknown which blocks
        were skipped.
    massive : tuple of int
        Blocks that create massive activations: the largest norm exceeds 20 times the median norm at their output, but
        not at their input; see `Profile.massive_activation_blocks`.
    dead : tuple of int
        Blocks that hardly change the state; see the argument `dead` of `HiddenStateMonitor`.
    not_finite : tuple of int
        Boundaries with a NaN or infinite state.

    Examples
    --------
    >>> measurement = Measurement(
    ...     step=1,
    ...     tokens=8,
    ...     cosine=(0.9,),
    ...     influence=(0.1,),
    ...     change=(0.5,),
    ...     norm=(1.0, 2.0),
    ...     median_norm=(1.0, 2.0),
    ...     largest_norm=(3.0, 4.0),
    ...     gradient_norm=(None, 0.2),
    ... )
    >>> measurement.scalars()["states/change/0"]
    0.5
    """

    step: int
    tokens: int
    cosine: tuple[float | None, ...]
    influence: tuple[float | None, ...]
    change: tuple[float | None, ...]
    norm: tuple[float | None, ...]
    median_norm: tuple[float | None, ...]
    largest_norm: tuple[float | None, ...]
    gradient_norm: tuple[float | None, ...]
    massive: tuple[int, ...] = field(default=())
    dead: tuple[int, ...] = field(default=())
    not_finite: tuple[int, ...] = field(default=())

    def scalars(self, prefix: str = "states") -> dict[str, float]:
        """Return the known values by name, for a logger.

        Parameters
        ----------
        prefix : str
            Prefix of all names.

        Returns
        -------
        dict of str to float
            The known values per block or boundary, such as ``states/influence/07``, and the numbers of massive, dead
            and not finite entries, such as ``states/dead``.
        """
        scalars: dict[str, float] = {}
        for name in _SERIES:
            values: Sequence[float | None] = getattr(self, name)
            digits = len(str(len(values) - 1))
            scalars |= {f"{prefix}/{name}/{k:0{digits}}": v for k, v in enumerate(values) if v is not None}
        return scalars | {f"{prefix}/{name}": float(len(getattr(self, name))) for name in _BLOCKS}

    def line(self) -> str:
        """Return the measurement as a line of JSON."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"


class NormSums:
    """Sums of the norms of the states at one boundary.

    `added`, float64 of shape (3,), contains the number of tokens, the number of tokens with a NaN or infinite state,
    and the sum of norms. `largest`, of shape (1,), is the largest norm. `histogram`, of shape (1, `HISTOGRAM_BINS`), is
    a `norm_histogram`.
    """

    def __init__(self, device: torch.device) -> None:
        self.added = torch.zeros(3, dtype=widest_float(device), device=device)
        self.largest = torch.zeros(1, device=device)
        self.histogram = torch.zeros(1, HISTOGRAM_BINS, dtype=torch.int64, device=device)

    def update(self, norm: Tensor, real: Tensor) -> None:
        """Add the norms of a batch, float32, for the tokens selected by `real`; both of shape (batch, tokens)."""
        finite = norm.isfinite()
        counted, norm = real & finite, torch.where(real & finite, norm, 0.0)
        self.added.add_(torch.stack([real.sum(), (real & ~finite).sum(), norm.sum(dtype=self.added.dtype)]))
        self.largest.copy_(torch.maximum(self.largest, norm.max()))
        self.histogram.add_(norm_histogram(norm.reshape(-1, 1), counted.flatten()))


def change_sums(entering: Tensor, leaving: Tensor, real: Tensor) -> Tensor:
    """Sum the number of finite tokens, the cosines and the relative changes of a batch by one block.

    The states are float32 of shape (batch, tokens, features); the result is float64 of shape (3,). A token whose
    entering state is zero has cosine 0 and change 0.
    """
    before, after = norms_of(entering), norms_of(leaving)
    scale = torch.where(before > 0, before, 1.0)
    cosine = (entering * leaving).sum(dim=-1) / scale / torch.where(after > 0, after, 1.0)
    change = torch.where(before > 0, norms_of(leaving - entering) / scale, 0.0)
    counted = real & cosine.isfinite() & change.isfinite()
    values = torch.stack([torch.ones_like(change), cosine.clamp(-1.0, 1.0), change])
    return torch.where(counted, values, 0.0).sum(dim=(1, 2), dtype=widest_float(change.device))


def norms_of(state: Tensor) -> Tensor:
    """Return the norm of each token's state, of shape (batch, tokens)."""
    norms: Tensor = torch.linalg.vector_norm(state, dim=-1)
    return norms


def reduce_sums(
    norms: Sequence[NormSums],
    changes: Sequence[Tensor],
    squares: Sequence[float | None],
    *,
    step: int,
    grad_scale: float,
    dead: float,
    group: Any,
) -> Measurement:
    """Reduce the sums of a step over all ranks of `group`, and return the measurement.

    `norms` and `squares` (sums of squared gradients) have one entry per boundary, `changes` one per block. Gradient
    norms are divided by `grad_scale`. Blocks with a mean relative change of at most `dead` are dead. Raise if no token
    was counted.
    """
    device = norms[0].added.device
    added = torch.stack([sums.added.to(device) for sums in norms])
    changed = torch.stack([sums.to(device) for sums in changes])
    gradient = torch.tensor(
        [[s or 0.0, float(s is not None)] for s in squares], dtype=widest_float(device), device=device
    )
    histogram = torch.cat([sums.histogram.to(device) for sums in norms])
    largest = torch.cat([sums.largest.to(device) for sums in norms])
    ranks, distributed = 1, torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size(group)
    if ranks > 1:
        for values in (added, changed, gradient, histogram):
            distributed.all_reduce(values, group=group)
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=group)
    if not bool((added[:, 0] > 0).any()):
        raise StreamlineError(
            f"Step {step} cannot be measured: no forward with gradients ran the blocks of this model. Expected at "
            "least one training forward per measured step. Open the monitor before torch.compile (hooks added later "
            "never run), train the same model object and not a copy (nn.DataParallel runs copies), and call step() "
            "once after each optimizer step."
        )
    tokens, not_finite_counts, norm_sums = added.cpu().unbind(dim=1)
    cosine = (changed[:, 1] / changed[:, 0]).cpu()
    change = (changed[:, 2] / changed[:, 0]).cpu()
    median, largest = median_of_histogram(histogram.cpu()), largest.cpu()
    finite = tokens - not_finite_counts
    # The loss of each rank is a mean over the tokens of this rank, and gradients are averaged over the ranks.
    gradient_norm = (gradient[:, 0].sqrt() / (grad_scale * ranks)).where(gradient[:, 1] > 0, torch.nan)
    return Measurement(
        step=step,
        tokens=int(tokens.max()),
        cosine=_known(cosine),
        influence=_known(1.0 - cosine),
        change=_known(change),
        norm=_known(norm_sums / finite),
        median_norm=_known(torch.where(finite > 0, median, torch.nan)),
        largest_norm=_known(torch.where(finite > 0, largest.double(), torch.nan)),
        gradient_norm=_known(gradient_norm),
        massive=_massive_activation_blocks(largest > MASSIVE_NORM_RATIO * median, finite > 0),
        dead=tuple((change <= dead).nonzero().flatten().tolist()),
        not_finite=tuple((not_finite_counts > 0).nonzero().flatten().tolist()),
    )


def _massive_activation_blocks(massive: Tensor, known: Tensor) -> tuple[int, ...]:
    """Return the blocks whose output is massive while the state at the previous known boundary is not."""
    boundaries = known.nonzero().flatten().tolist()
    return tuple(
        current - 1 for previous, current in pairwise(boundaries) if massive[current] and not massive[previous]
    )


def _known(values: Tensor) -> tuple[float | None, ...]:
    return tuple(value if math.isfinite(value) else None for value in values.tolist())


class MeasurementFile:
    """Append measurements to a JSON Lines file.

    Existing lines are kept. An incomplete last line, left by a process that was killed while writing, is removed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._end_checked = False

    def append(self, measurement: Measurement) -> None:
        """Append a measurement and flush it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if not self._end_checked:
                    self._drop_incomplete_line(file)
                file.write(measurement.line().encode())
        except OSError as error:
            raise StreamlineError(f"{self.path} cannot be written: {error}. Choose another file.") from error
        self._end_checked = True

    def _drop_incomplete_line(self, file: IO[bytes]) -> None:
        size = file.seek(0, 2)
        file.seek(max(0, size - _LONGEST_LINE))
        rest = file.read().rpartition(b"\n")[2]
        if not rest.startswith(_LINE_START[: len(rest)]):
            raise StreamlineError(
                f"{self.path} ends with {rest[:40]!r}. Expected a file of measurements. Choose another file."
            )
        file.truncate(size - len(rest))


_LINE_START = b'{"step": '
_LONGEST_LINE = 2**20  # bytes; enough for thousands of blocks
