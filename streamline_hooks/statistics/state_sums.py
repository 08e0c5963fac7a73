"""Sums over the hidden states of a pass, updated batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from streamline_hooks.errors import StreamlineError
from streamline_hooks.precision import float64_device
from streamline_hooks.statistics.bootstrap import ResampledSums
from streamline_hooks.statistics.norms import StateEntropy, StateNorms

# What one product works on: on a CPU it should stay in the cache, and be large enough to share among threads.
BYTES_AT_ONCE = {"cpu": 2**24}
_ON_AN_ACCELERATOR = 2**28


def token_grams(states: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """Return the inner products of the states of each chosen token, float64 of shape (chosen, places, places).

    Products are formed in float64: an angle near 0 is about √(2(1 − cosine)), so an error of 1e-7 in the cosine would
    be 4e-4 in the angle. The states are of shape (tokens, features), one per boundary; `chosen` rises.
    """
    first, places = states[0], len(states)
    odd = next((k for k, state in enumerate(states) if state.shape != first.shape), None)
    if odd is not None:
        raise StreamlineError(
            f"The states at place {odd} have the shape {tuple(states[odd].shape)}, those at place 0 "
            f"{tuple(first.shape)} (tokens, features); states of different shapes cannot be compared."
        )
    device = float64_device(first.device)
    limit = BYTES_AT_ONCE.get(device.type, _ON_AN_ACCELERATOR)
    size = max(1, min(len(chosen), limit // (8 * places * first.shape[1])))
    grams = torch.empty(len(chosen), places, places, dtype=torch.float64, device=device)
    gathered = torch.empty(size, places, first.shape[1], dtype=torch.float64, device=device)
    for start in range(0, len(chosen), size):
        part = run_or_index(chosen[start : start + size])
        filled = gathered[: min(size, len(chosen) - start)]
        for k, state in enumerate(states):
            filled[:, k].copy_(state[part])
        torch.bmm(filled, filled.transpose(1, 2), out=grams[start : start + size])
    return grams


def run_or_index(rising: Tensor) -> slice | Tensor:
    """Rising numbers as a slice where they are consecutive, which copies nothing, and else as they are."""
    if len(rising) and int(rising[-1]) - int(rising[0]) == len(rising) - 1:
        return slice(int(rising[0]), int(rising[-1]) + 1)
    return rising


# Float64 inner products of a thousand features are off by less. It moves no angle by more than 4.5e-8 of π.
_ROUNDING = 1e-14


class StateSimilarity:
    """Sums of cosine and angular distance between every two of the L + 1 states of a token, in float64.

    Boundary k is the input of block k, boundary L the output of the last block; the window ``range(a, b)`` changes
    state a into state b. The angular distance is arccos(cosine)/π, in [0, 1] (Gromov et al., arXiv 2403.17887, eq. 8),
    averaged over tokens; it is exactly 0 for states of one direction. A state of zeros has cosine 0.
    """

    def __init__(self, places: int, replicates: int = 0) -> None:
        self.places = places
        self._pairs = torch.triu_indices(places, places, 1)
        self.sums = ResampledSums(2 * self._pairs.shape[1] + 1, replicates)

    def update(self, grams: Sequence[Tensor], weights: Tensor | None = None) -> None:
        """Add sequences, each with `token_grams` of shape (tokens, places, places), and their bootstrap weights."""
        self.sums.add(torch.stack([self._sums_of(gram) for gram in grams]), weights)

    @property
    def cosine(self) -> Tensor:
        """Mean cosine, of shape (1 + replicates, places, places), float64: the mean, then that of each resample."""
        return self._matrices(self._means[:, : self._pairs.shape[1]], 1.0)

    @property
    def angular(self) -> Tensor:
        """Mean angular distance in [0, 1], of shape (1 + replicates, places, places), float64."""
        return self._matrices(self._means[:, self._pairs.shape[1] : -1], 0.0)

    @property
    def count(self) -> Tensor:
        """Tokens, of shape (1 + replicates,)."""
        return self.sums.rows[:, -1]

    @property
    def _means(self) -> Tensor:
        return self.sums.rows / self.count[:, None]

    def _sums_of(self, gram: Tensor) -> Tensor:
        rows, columns = self._pairs.to(gram.device)
        norm = gram.diagonal(dim1=1, dim2=2).sqrt()
        cosine = gram.flatten(1)[:, rows * self.places + columns]
        # One division after the other: the product of two norms may overflow.
        cosine.div_(norm[:, rows]).div_(norm[:, columns]).nan_to_num_(nan=0.0)
        cosine.masked_fill_(cosine > 1.0 - _ROUNDING, 1.0).clamp_min_(-1.0)
        summed = [cosine.sum(dim=0), cosine.arccos_().sum(dim=0) / math.pi]
        return torch.cat([*summed, summed[0].new_tensor([len(gram)])]).cpu()

    def _matrices(self, values: Tensor, diagonal: float) -> Tensor:
        matrices = torch.full((len(values), self.places, self.places), diagonal, dtype=torch.float64)
        rows, columns = self._pairs
        matrices[:, rows, columns] = matrices[:, columns, rows] = values
        return matrices


class StateSums:
    """Sums over the states at each boundary, equal for any batch size, padding side, order and sharding.

    `similarity`, `norms` and `entropy` cover the tokens that count, `last` each sequence's last real token. They hold
    about (1 + replicates)·places² float64 numbers on the CPU.
    """

    def __init__(self, places: int, replicates: int = 0) -> None:
        self.places, self.replicates = places, replicates
        self.similarity = StateSimilarity(places, replicates)
        self.last = StateSimilarity(places, replicates)
        self.norms = StateNorms(places, replicates)
        self.entropy = StateEntropy(places, replicates)

    def update(
        self, states: Sequence[Tensor], mask: Tensor, *, real: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Add a batch of states, one per boundary, each of shape (batch, tokens, features).

        `mask`, (batch, tokens), selects tokens; `real`, by default `mask`, marks the tokens that are no padding; a
        sequence without any is left out. `weights` are the sequences' `poisson_weights`.
        """
        if len(states) != self.places:
            raise StreamlineError(f"Got {len(states)} states; expected {self.places}, one more than blocks.")
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
                "A state holds NaN, infinite or huge values. Look at the weights of the blocks, or run in a wider "
                "precision (float32 or bfloat16)."
            )
        weights = None if weights is None else weights[rows]
        by_sequence = grams.split(mask[rows].sum(dim=1).tolist())
        self.similarity.update(by_sequence, weights)
        self.norms.update(by_sequence, weights)
        self.last.update(ends.split(1), weights)
        runs = [(row, run_or_index(mask[row].nonzero().flatten())) for row in rows.tolist()]
        # One sequence after the other: where its tokens are not consecutive, they are copied.
        self.entropy.update(([state[row][run] for state in states] for row, run in runs), weights)

    def merge(self, other: Self) -> None:
        """Add the sums over other sequences."""
        for mine, its in zip(self._resampled().values(), other._resampled().values(), strict=True):
            mine.merge(its)
        self.norms.histogram = self.norms.histogram + other.norms.histogram
        self.norms.largest = torch.maximum(self.norms.largest, other.norms.largest)

    def drawn(self) -> Tensor:
        """Return the indices of the usable resamples; raise if there are too few, or not two different sequences."""
        if self.replicates < _LEAST_REPLICATES:
            raise StreamlineError(
                f"How sure a value is takes {_LEAST_REPLICATES} replicates at least; this profile has "
                f"{self.replicates}. Profile with replicates=100."
            )
        sequences = self.last.count
        if (sequences.remainder(sequences[0]) == 0).all():  # so are the counts if each is drawn as often as the others
            raise StreamlineError(
                "How sure a value is takes two different sequences at least, and is worth little below 20; this "
                f"profile has {int(sequences[0])}, all of the same content. Profile more text."
            )
        counts = torch.stack([sequences, self.similarity.count, self.entropy.count])
        return (counts[counts[:, 0] > 0, 1:] > 0).all(dim=0).nonzero().flatten()

    def resample(self, number: int) -> StateSums:
        """The sums over one resample of the sequences, where there are such: not for medians and greatest norms."""
        one = StateSums(self.places)
        for mine, its in zip(one._resampled().values(), self._resampled().values(), strict=True):
            mine.rows = its.rows[1 + number : 2 + number]
        one.norms.histogram, one.norms.largest = self.norms.histogram, self.norms.largest
        return one

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, for a file."""
        resampled = {name: sums.rows.clone() for name, sums in self._resampled().items()}
        return {**resampled, "histogram": self.norms.histogram.clone(), "largest": self.norms.largest.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load sums of the same number of boundaries and replicates."""
        for name, mine in self.state_dict().items():
            given = f"{tuple(state[name].shape)} of {state[name].dtype}" if name in state else "absent"
            if given != (expected := f"{tuple(mine.shape)} of {mine.dtype}"):
                raise StreamlineError(f"The sums named {name} are {given}; expected {expected}.")
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


_LEAST_REPLICATES = 20
