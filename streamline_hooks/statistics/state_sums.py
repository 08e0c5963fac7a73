"""Everything that a profile sums, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from streamline_hooks.errors import StreamlineError
from streamline_hooks.statistics.bootstrap import ResampledSums
from streamline_hooks.statistics.entropy import StateEntropy
from streamline_hooks.statistics.gram import run_or_index, token_grams
from streamline_hooks.statistics.norms import StateNorms
from streamline_hooks.statistics.similarity import StateSimilarity


class StateSums:
    """Sums over the states at each place of the residual stream.

    Parameters
    ----------
    places : int
        Of the states; one more than blocks.
    replicates : int
        Number of resamples of the sequences, see `ResampledSums`.

    Attributes
    ----------
    similarity, norms, entropy
        Of the tokens that count.
    last : StateSimilarity
        Of each sequence's last real token, whether it counts or not.

    Notes
    -----
    Some (1 + replicates)·places² numbers in float64, on the CPU, however many the tokens. The sums are equal whatever
    the batch size, the padding side, the order or the number of shards, but for rounding.
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
        """Add one batch.

        Parameters
        ----------
        states : sequence of torch.Tensor
            One a place, of shape (batch, tokens, features).
        mask : torch.Tensor
            The tokens that count, of shape (batch, tokens).
        real : torch.Tensor, optional
            The tokens that are no padding, of which the last is compared on its own; by default those that count.
            A sequence without any is left out.
        weights : torch.Tensor, optional
            See `poisson_weights`, of shape (batch, replicates); needed where there are replicates.

        Raises
        ------
        StreamlineError
            If the states do not fit, or are not finite.
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
        """The numbers of the resamples that hold whatever the whole does, of shape (up to replicates,).

        Raises
        ------
        StreamlineError
            If there are too few resamples, or not two different sequences, which leaves nothing to resample.
        """
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
        """Take sums up again.

        Raises
        ------
        StreamlineError
            If they are of another number of places or replicates.
        """
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
