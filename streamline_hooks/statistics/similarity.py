"""Sum similarity and distance between the hidden states at all boundaries, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from streamline_hooks.core import StreamlineError, float64_device
from streamline_hooks.statistics.bootstrap import ResampledSums
from streamline_hooks.statistics.norms import StateEntropy, StateNorms

# Size of the operands of one product. On a CPU they should fit the cache and still occupy all threads.
BYTES_AT_ONCE = {"cpu": 2**24}
_ON_AN_ACCELERATOR = 2**28


def token_grams(states: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """Return the inner products of the states of each chosen token, float64 of shape (chosen, boundaries, boundaries).

    The states have the shape (tokens, features), one per boundary; `chosen` has token indices in ascending order.
    Products are computed in float64: an angle near 0 is about √(2(1 − cosine)), so an error of 1e-7 in the cosine would
    be 4e-4 in the angle.
    """
    first, num_boundaries = states[0], len(states)
    mismatch = next((k for k, state in enumerate(states) if state.shape != first.shape), None)
    if mismatch is not None:
        raise StreamlineError(
            f"The states at boundary {mismatch} have the shape {tuple(states[mismatch].shape)}. Expected the shape at "
            f"boundary 0, {tuple(first.shape)} (tokens, features). Choose a stack whose blocks have one width."
        )
    device = float64_device(first.device)
    limit = BYTES_AT_ONCE.get(device.type, _ON_AN_ACCELERATOR)
    size = max(1, min(len(chosen), limit // (8 * num_boundaries * first.shape[1])))
    grams = torch.empty(len(chosen), num_boundaries, num_boundaries, dtype=torch.float64, device=device)
    gathered = torch.empty(size, num_boundaries, first.shape[1], dtype=torch.float64, device=device)
    for start in range(0, len(chosen), size):
        part = as_slice_if_consecutive(chosen[start : start + size])
        by_device = _on_each_device(part, states)
        filled = gathered[: min(size, len(chosen) - start)]
        for k, state in enumerate(states):
            filled[:, k].copy_(state[by_device[state.device]])
        torch.bmm(filled, filled.transpose(1, 2), out=grams[start : start + size])
    return grams


def as_slice_if_consecutive(indices: Tensor) -> slice | Tensor:
    """Return ascending indices as a slice if they are consecutive, which avoids a copy, else unchanged."""
    if len(indices) and int(indices[-1]) - int(indices[0]) == len(indices) - 1:
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices


def _on_each_device(indices: slice | Tensor, states: Sequence[Tensor]) -> dict[torch.device, slice | Tensor]:
    """Return indices for the states of each device; the blocks of a model may be on several."""
    devices = dict.fromkeys(state.device for state in states)
    return {device: indices if isinstance(indices, slice) else indices.to(device) for device in devices}


# Larger than the error of float64 inner products of a thousand features; changes an angle by at most 4.5e-8 π.
_ROUNDING = 1e-14


class StateSimilarity:
    """Sums of cosine and angular distance between every two of the L + 1 states of a token, in float64.

    Boundary k is the input of block k, and boundary L the output of the last block, so the window ``range(a, b)`` maps
    state a to state b. The angular distance is arccos(cosine)/π, in [0, 1] (Gromov et al., arXiv 2403.17887, eq. 8),
    averaged over tokens. It is exactly 0 for parallel states. A zero state has cosine 0.
    """

    def __init__(self, num_boundaries: int, replicates: int = 0) -> None:
        self.num_boundaries = num_boundaries
        self._pairs = torch.triu_indices(num_boundaries, num_boundaries, 1)
        self.sums = ResampledSums(2 * self._pairs.shape[1] + 1, replicates)

    def update(self, grams: Sequence[Tensor], weights: Tensor | None = None) -> None:
        """Add the `token_grams`, (tokens, boundaries, boundaries), of each sequence, and the bootstrap weights."""
        self.sums.add(torch.stack([self._sums_of(gram) for gram in grams]), weights)

    @property
    def cosine(self) -> Tensor:
        """Mean cosine of all sequences, then of each resample; (1 + replicates, boundaries, boundaries), float64."""
        return self._matrices(self._means[:, : self._pairs.shape[1]], 1.0)

    @property
    def angular(self) -> Tensor:
        """Mean angular distance in [0, 1], in the shape of `cosine`."""
        return self._matrices(self._means[:, self._pairs.shape[1] : -1], 0.0)

    @property
    def count(self) -> Tensor:
        """Number of tokens, of shape (1 + replicates,)."""
        return self.sums.rows[:, -1]

    @property
    def _means(self) -> Tensor:
        return self.sums.rows / self.count[:, None]

    def _sums_of(self, gram: Tensor) -> Tensor:
        rows, columns = self._pairs = self._pairs.to(gram.device)
        norm = gram.diagonal(dim1=1, dim2=2).sqrt()
        cosine = gram.flatten(1)[:, rows * self.num_boundaries + columns]
        # Divide twice, because the product of two norms may overflow.
        cosine.div_(norm[:, rows]).div_(norm[:, columns]).nan_to_num_(nan=0.0)
        cosine.masked_fill_(cosine > 1.0 - _ROUNDING, 1.0).clamp_min_(-1.0)
        summed = [cosine.sum(dim=0), cosine.arccos_().sum(dim=0) / math.pi]
        return torch.cat([*summed, gram.new_full((1,), len(gram))])

    def _matrices(self, values: Tensor, diagonal: float) -> Tensor:
        matrices = torch.full((len(values), self.num_boundaries, self.num_boundaries), diagonal, dtype=torch.float64)
        rows, columns = self._pairs.cpu()
        matrices[:, rows, columns] = matrices[:, columns, rows] = values
        return matrices


class StateSums:
    """Sums over the states at each boundary, independent of batch size, padding side, order and sharding.

    `similarity`, `norms` and `entropy` cover the counted tokens, `last` the last real token of each sequence. The sums
    are about (1 + replicates)·boundaries² float64 numbers on the CPU.
    """

    def __init__(self, num_boundaries: int, replicates: int = 0) -> None:
        self.num_boundaries, self.replicates = num_boundaries, replicates
        self.similarity = StateSimilarity(num_boundaries, replicates)
        self.last = StateSimilarity(num_boundaries, replicates)
        self.norms = StateNorms(num_boundaries, replicates)
        self.entropy = StateEntropy(num_boundaries, replicates)

    def update(
        self, states: Sequence[Tensor], mask: Tensor, *, real: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Add a batch of states, one per boundary, each of shape (batch, tokens, features).

        `mask`, (batch, tokens), selects the tokens to count. `real`, by default `mask`, is False for padding; sequences
        without real tokens are excluded. `weights` are the `poisson_weights` of the sequences.
        """
        if len(states) != self.num_boundaries:
            raise StreamlineError(
                f"Got {len(states)} states. Expected {self.num_boundaries}. Pass one state per boundary."
            )
        real = (mask if real is None else real).cpu().bool()
        mask = mask.cpu().bool() & real
        rows = real.any(dim=1).nonzero().flatten()
        if not len(rows):
            return
        last = torch.where(real, torch.arange(real.shape[1]), -1).amax(dim=1)[rows]
        flat = [state.flatten(0, 1) for state in states]
        grams = token_grams(flat, mask.flatten().nonzero().flatten())
        ends = token_grams(flat, rows * real.shape[1] + last)
        if not (grams.isfinite().all() and ends.isfinite().all()):
            raise StreamlineError(
                "A state contains NaN, infinite or very large values. Expected finite values. Check the weights of the "
                "blocks, or run the model in float32 or bfloat16."
            )
        weights = None if weights is None else weights[rows]
        by_sequence = grams.split(mask[rows].sum(dim=1).tolist())
        self.similarity.update(by_sequence, weights)
        self.norms.update(by_sequence, weights)
        self.last.update(ends.split(1), weights)
        runs = [(row, as_slice_if_consecutive(mask[row].nonzero().flatten())) for row in rows.tolist()]
        by_device = [(row, _on_each_device(run, states)) for row, run in runs]
        # One sequence at a time, because tokens that are not consecutive are copied.
        self.entropy.update(([state[row][run[state.device]] for state in states] for row, run in by_device), weights)

    def merge(self, other: Self) -> None:
        """Add the sums over other sequences."""
        for sums, other_sums in zip(self._resampled().values(), other._resampled().values(), strict=True):
            sums.merge(other_sums)
        self.norms.histogram = self.norms.histogram + other.norms.histogram
        self.norms.largest = torch.maximum(self.norms.largest, other.norms.largest)

    def drawn(self) -> Tensor:
        """Return the indices of the resamples that contain tokens.

        Raises `StreamlineError` if there are fewer than 20 replicates, or no two different sequences.
        """
        if self.replicates < _MIN_REPLICATES:
            raise StreamlineError(
                f"The profile has {self.replicates} replicates. Expected at least {_MIN_REPLICATES} for a confidence "
                "interval. Profile with replicates=100."
            )
        sequences = self.last.count
        if (sequences.remainder(sequences[0]) == 0).all():  # equal weights of all sequences
            raise StreamlineError(
                "A confidence interval takes at least two different sequences, and is unreliable below 20. This "
                f"profile has {int(sequences[0])}, all of the same content. Profile more text."
            )
        counts = torch.stack([sequences, self.similarity.count, self.entropy.count])
        return (counts[counts[:, 0] > 0, 1:] > 0).all(dim=0).nonzero().flatten()

    def resample(self, number: int) -> StateSums:
        """Return the sums over one resample of the sequences.

        The histograms and largest norms are those of all sequences, because they are not resampled.
        """
        result = StateSums(self.num_boundaries)
        for sums, source in zip(result._resampled().values(), self._resampled().values(), strict=True):
            sums.rows = source.rows[1 + number : 2 + number]
        result.norms.histogram, result.norms.largest = self.norms.histogram, self.norms.largest
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums as tensors."""
        resampled = {name: sums.rows.clone() for name, sums in self._resampled().items()}
        return {**resampled, "histogram": self.norms.histogram.clone(), "largest": self.norms.largest.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore sums of the same number of boundaries and replicates."""
        for name, current in self.state_dict().items():
            actual = f"{tuple(state[name].shape)} of {state[name].dtype}" if name in state else "absent"
            if actual != (expected := f"{tuple(current.shape)} of {current.dtype}"):
                raise StreamlineError(
                    f"The sums {name} are {actual}. Expected {expected}. "
                    "Load them into a profile with the same boundaries and replicates."
                )
        for name, sums in self._resampled().items():
            sums.rows = state[name].clone()
        self.norms.histogram, self.norms.largest = state["histogram"].clone(), state["largest"].clone()

    def _resampled(self) -> dict[str, ResampledSums]:
        return {
            "similarity": self.similarity.sums,
            "last": self.last.sums,
            "norms": self.norms.sums,
            "entropy": self.entropy.sums,
        }


_MIN_REPLICATES = 20
