"""A profile: similarity, norms and entropy of the hidden states for every window of blocks, from one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from streamline_hooks.arguments import checked
from streamline_hooks.core.tables import table
from streamline_hooks.errors import StreamlineError
from streamline_hooks.statistics.state_sums import StateSums
from streamline_hooks.statistics.storage import read_file, write_file

Statistic = Literal["cosine", "angular", "last_angular", "relative_magnitude", "entropy"]


def window_matrices(sums: StateSums, statistic: Statistic) -> Tensor:
    """Return a statistic of every window, and the same in each resample.

    The result is float64 of shape (1 + replicates, places, places), with ``range(a, b)`` at [:, a, b]. For states a and
    b around a window: their similarity or distance, the summed relative magnitudes of the window's blocks, or the
    increase of entropy from a to b.
    """
    match statistic:
        case "cosine":
            return sums.similarity.cosine
        case "angular":
            return sums.similarity.angular
        case "last_angular":
            return sums.last.angular
        case "relative_magnitude":
            upto = pad(sums.norms.relative_magnitude.cumsum(dim=1), (1, 0))
            return (upto[:, None, :] - upto[:, :, None]).abs()
        case "entropy":
            return sums.entropy.mean[:, None, :] - sums.entropy.mean[:, :, None]


_FORMAT = 1
MASSIVE = 20.0  # times the median norm, from which a state counts as massive


class Profile:
    """What is known of the states at each place of the residual stream; made by `profile`.

    Place k is what enters block k, place L what leaves the last block. Whatever compares two places is read as a
    matrix indexed by the start and the stop of a window: ``range(a, b)`` turns state a into state b; see `matrix`.

    Parameters
    ----------
    places : int
        L + 1, or fewer where the last blocks were not run.
    replicates : int
        Number of resamples of the sequences, for intervals.
    about : mapping, optional
        What the profile is of, as JSON values. Profiles that differ in it do not merge.

    Examples
    --------
    >>> one = Profile(3)
    >>> a, b = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    >>> one.update([a, b, b], torch.ones(1, 1))
    >>> one.value("angular", range(0, 1)), one.value("cosine", range(1, 2)), one.tokens
    (0.5, 1.0, 1)
    """

    @checked(places=1, replicates=0)
    def __init__(self, places: int, *, replicates: int = 0, about: Mapping[str, Any] | None = None) -> None:
        self.about = dict(about or {})
        self.sums = StateSums(places, replicates)

    def update(
        self, states: Sequence[Tensor], mask: Tensor, *, real: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Add one batch; see `StateSums.update`."""
        self.sums.update(states, mask, real=real, weights=weights)

    def merge(self, other: Self) -> None:
        """Add the profile of other sequences.

        Raises
        ------
        StreamlineError
            If the other is of another model, or was measured otherwise; the text says what differs.
        """
        ours, theirs = self._options(), other._options()
        differ = [
            f"{name} is {ours.get(name, 'absent')} here and {theirs.get(name, 'absent')} there"
            for name in {**ours, **theirs}
            if ours.get(name) != theirs.get(name)
        ]
        if differ:
            raise StreamlineError(
                f"These profiles cannot be merged: {'; '.join(differ)}. Profile the same model with the same options."
            )
        self.sums.merge(other.sums)

    @property
    def places(self) -> int:
        """Number of places of which the states were compared: one more than the blocks that were run."""
        return self.sums.places

    @property
    def length(self) -> int:
        """Number of blocks of the stack."""
        return int(self.about.get("blocks", self.places - 1))

    @property
    def tokens(self) -> int:
        """Tokens that were counted."""
        return int(self.sums.similarity.count[0])

    @property
    def sequences(self) -> int:
        """Sequences with a real token."""
        return int(self.sums.last.count[0])

    @property
    def resampled(self) -> bool:
        """Whether it can be told how sure its values are; see `replicates`."""
        try:
            return len(self.sums.drawn()) > 0
        except StreamlineError:
            return False

    @property
    def cosine(self) -> Tensor:
        """Mean cosine of the states at two places, of shape (places, places), float64."""
        return self.matrix("cosine")

    @property
    def angular(self) -> Tensor:
        """Mean angular distance in [0, 1], of shape (places, places), float64."""
        return self.matrix("angular")

    @property
    def last_angular(self) -> Tensor:
        """Mean angular distance of each sequence's last real token, of shape (places, places), float64."""
        return self.matrix("last_angular")

    @property
    def relative_magnitude(self) -> Tensor:
        """Mean of ‖leaving − entering‖/‖entering‖ of each block, of shape (places - 1,), float64."""
        self._require_counted()
        return self.sums.norms.relative_magnitude[0]

    @property
    def entropy(self) -> Tensor:
        """Entropy at each place in nats a feature, of shape (places,), float64; see `StateEntropy`."""
        self._require_counted("entropy")
        return self.sums.entropy.mean[0]

    @property
    def norms(self) -> Tensor:
        """Mean norm at each place, of shape (places,), float64."""
        self._require_counted()
        return self.sums.norms.mean[0]

    @property
    def median_norms(self) -> Tensor:
        """Median norm at each place, right to 2.2 %, of shape (places,), float64; see `StateNorms`."""
        self._require_counted()
        return self.sums.norms.median

    @property
    def largest_norms(self) -> Tensor:
        """Greatest norm at each place, of shape (places,), float64."""
        self._require_counted()
        return self.sums.norms.largest.clone()

    @property
    def massive_births(self) -> list[int]:
        """The blocks in which massive activations are born (Sun et al., arXiv 2402.17762).

        At their exit, but not at their entrance, the greatest norm of a token is above 20 times the median norm: about
        what one feature of 1,000 times the median magnitude, which is how the paper defines them, comes to among
        2,500. A window with such a block in it is hard to repair by a linear map. Only tokens that were counted are
        looked at: where the first ones are skipped, so may be the massive activations.
        """
        massive = self.largest_norms > MASSIVE * self.median_norms
        return [int(k) for k in (massive[1:] & ~massive[:-1]).nonzero().flatten()]

    @checked()
    def matrix(self, statistic: Statistic) -> Tensor:
        """A statistic of every window at once.

        Parameters
        ----------
        statistic : {"cosine", "angular", "last_angular", "relative_magnitude", "entropy"}
            See `window_matrices`.

        Returns
        -------
        torch.Tensor
            Of shape (places, places), float64; the window ``range(a, b)`` is at [a, b].

        Raises
        ------
        StreamlineError
            If nothing has been counted yet, or there is no such statistic.
        """
        self._require_counted(statistic)
        return window_matrices(self.sums, statistic)[0]

    def value(self, statistic: Statistic, window: range) -> float:
        """A statistic of one window; see `matrix`.

        Raises
        ------
        StreamlineError
            If the profile does not cover the window.
        """
        self._require_covered(window)
        return float(self.matrix(statistic)[window.start, window.stop])

    @checked()
    def replicates(self, statistic: Statistic) -> Tensor:
        """A statistic of every window in each resample of the sequences, for how sure a choice is.

        Parameters
        ----------
        statistic : str
            See `matrix`.

        Returns
        -------
        torch.Tensor
            Of shape (replicates, places, places), float64. A resample that happens to be empty is left out.

        Raises
        ------
        StreamlineError
            If there are no replicates, or not two different sequences.
        """
        self._require_counted(statistic)
        return window_matrices(self.sums, statistic)[1 + self.sums.drawn()]

    @checked(level="(0, 1)")
    def interval(self, statistic: Statistic, window: range, level: float = 0.95) -> tuple[float, float]:
        """A confidence interval for a window's value, over the sequences that might have been drawn.

        Parameters
        ----------
        statistic : str
            See `matrix`.
        window : range
        level : float
            Share of such intervals that hold the true value, if there are many sequences.

        Returns
        -------
        low, high : float
            Percentiles of the replicates of the Poisson bootstrap, see `poisson_weights`.

        Raises
        ------
        StreamlineError
            As `value` and `replicates` do.
        """
        self._require_covered(window)
        drawn = self.replicates(statistic)[:, window.start, window.stop]
        tails = torch.tensor([(1.0 - level) / 2, (1.0 + level) / 2], dtype=torch.float64)
        low, high = drawn.quantile(tails).tolist()
        return low, high

    def resamples(self) -> Iterator[Profile]:
        """The profile of each resample, so that of whatever follows from a profile it can be told how sure it is.

        Median and greatest norms, and the births of massive activations, are those of all sequences.

        Raises
        ------
        StreamlineError
            As `replicates` does.
        """
        self._require_counted()
        for number in self.sums.drawn().tolist():
            one = Profile(self.places, about=self.about)
            one.sums = self.sums.resample(number)
            yield one

    def save(self, path: str | Path) -> Path:
        """Write the profile into one safetensors file.

        Raises
        ------
        StreamlineError
            If it cannot be written.
        """
        made_by = {"format": _FORMAT, "version": version("streamline_hooks")}
        return write_file(path, self.sums.state_dict(), {"profile": {**made_by, **self._options()}})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a profile that `save` wrote.

        Raises
        ------
        StreamlineError
            If the file holds no profile, or one of another format, or is damaged.
        """
        tensors, values = read_file(path, "a profile")
        saved = values.get("profile")
        if not isinstance(saved, dict):
            raise StreamlineError(f"{path} holds {', '.join(values) or 'nothing'}; expected a profile.")
        if saved.get("format") != _FORMAT:
            raise StreamlineError(
                f"{path} is a profile of format {saved.get('format')}, written by version {saved.get('version')}; this "
                f"version reads format {_FORMAT}. Use that version, or profile again."
            )
        about = {name: value for name, value in saved.items() if name not in ("format", "version", *_SHAPE)}
        absent = next((name for name in _SHAPE if not isinstance(saved.get(name), int)), None)
        if absent:
            raise StreamlineError(f"{path} is damaged: {absent} is absent. Profile again.")
        one = cls(saved["places"], replicates=saved["replicates"], about=about)
        try:
            one.sums.load_state_dict(tensors)
        except StreamlineError as error:
            raise StreamlineError(f"{path} is damaged: {error} Profile again.") from error
        return one

    def __str__(self) -> str:
        return profile_table(self)

    def _options(self) -> dict[str, Any]:
        return {**self.about, **dict(zip(_SHAPE, (self.places, self.sums.replicates), strict=True))}

    def _require_counted(self, statistic: str = "cosine") -> None:
        if not self.tokens:
            raise StreamlineError("No token has been counted yet; update with a batch that has real tokens.")
        if statistic == "entropy" and not self.sums.entropy.count[0]:
            raise StreamlineError(
                "Entropy takes sequences of which two tokens count; in this profile each has only one. Profile with "
                "tokens='all'."
            )

    def _require_covered(self, window: range) -> None:
        if window.step != 1 or not 0 <= window.start < window.stop:
            raise StreamlineError(f"{window} is no window; expected a run of consecutive blocks such as range(3, 6).")
        if window.stop <= self.places - 1:
            return
        if window.stop <= self.length:
            raise StreamlineError(
                f"The window of blocks {window.start} to {window.stop - 1} is not in this profile, which covers blocks "
                f"0 to {self.places - 2}: those after them were to stay, and were not run. Profile again without keep."
            )
        raise StreamlineError(
            f"The window of blocks {window.start} to {window.stop - 1} is out of range: the stack has {self.length} "
            f"blocks, 0 to {self.length - 1}."
        )


_SHAPE = ("places", "replicates")


def profile_table(profile: Profile) -> str:
    """Each block's statistics, as a window of its own, and the norms of the states that leave it."""
    what = f"{profile.about.get('model', 'a model')}, {profile.about.get('stack', 'its stack')}"
    count = f"{profile.tokens:,} tokens of {profile.sequences:,} sequences"
    heading = f"{what}: {profile.places - 1} of {profile.length} blocks, {count}"
    if not profile.tokens:
        return heading
    matrices = [window_matrices(profile.sums, name)[0].diagonal(1) for name in get_args(Statistic)]
    statistics = torch.stack([*matrices, profile.median_norms[1:], profile.largest_norms[1:]], dim=1).tolist()
    rows = []
    for k, (cosine, angular, last, magnitude, entropy, median, largest) in enumerate(statistics):
        numbers = [f"{value:.4f}" for value in (cosine, angular, last, magnitude)]
        born = "massive activations are born" if k in profile.massive_births else ""
        rows.append([k, *numbers, f"{entropy:+.4f}", f"{median:.4g}", f"{largest:.4g}", born])
    columns = ["block", "cosine", "angular", "last token", "magnitude", "entropy", "median norm", "greatest", ""]
    return f"{heading}\n{table(rows, columns)}"
