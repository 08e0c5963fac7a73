"""Define the profile of a model: similarity, norms and entropy of its hidden states for every window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from streamline_hooks.core import StreamlineError, describe_blocks, read_file, table, validate_arguments, write_file
from streamline_hooks.statistics.similarity import StateSums

Statistic = Literal["cosine", "angular", "last_angular", "relative_magnitude", "entropy"]


def window_matrices(sums: StateSums, statistic: Statistic) -> Tensor:
    """Return a statistic of every window, for all sequences and for each resample.

    The result is a float64 tensor of shape (1 + replicates, boundaries, boundaries) with ``range(a, b)`` at [:, a, b],
    see `Profile.matrix`.
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
MASSIVE_NORM_RATIO = 20.0  # a state with a larger multiple of the median norm is massive


class Profile:
    """Similarity, norms and entropy of the hidden states at each boundary of the blocks, measured by `profile`.

    Boundary k is the input of block k, and boundary L the output of the last block. Statistics of two boundaries are
    matrices indexed by the start and stop of a window: ``range(a, b)`` maps state a to state b. See `matrix`.

    Parameters
    ----------
    num_boundaries : int
        Number of boundaries: L + 1, or fewer if the last blocks are not run.
    replicates : int
        Number of bootstrap resamples of the sequences for confidence intervals.
    about : mapping, optional
        JSON values that identify the model and the settings. Only profiles with equal values can be merged.

    Examples
    --------
    >>> profile = Profile(3)
    >>> a, b = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    >>> profile.update([a, b, b], torch.ones(1, 1))
    >>> profile.value("angular", range(0, 1)), profile.value("cosine", range(1, 2)), profile.tokens
    (0.5, 1.0, 1)
    """

    @validate_arguments(num_boundaries=1, replicates=0)
    def __init__(self, num_boundaries: int, *, replicates: int = 0, about: Mapping[str, Any] | None = None) -> None:
        self.about = dict(about or {})
        self.sums = StateSums(num_boundaries, replicates)

    def update(
        self, states: Sequence[Tensor], mask: Tensor, *, real: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Add one batch.

        Parameters
        ----------
        states : sequence of torch.Tensor
            The state at each boundary, of shape (batch, tokens, features).
        mask : torch.Tensor
            The tokens to count, of shape (batch, tokens).
        real : torch.Tensor, optional
            Mask of shape (batch, tokens), False for padding. Default: `mask`.
        weights : torch.Tensor, optional
            The `poisson_weights` of the sequences, of shape (batch, replicates). Required with replicates.

        Raises
        ------
        StreamlineError
            If the number or the shapes of the states or weights are wrong, or a state is not finite.
        """
        self.sums.update(states, mask, real=real, weights=weights)

    def merge(self, other: Self) -> None:
        """Add the profile of other sequences.

        Raises `StreamlineError` if it is of another model or was measured with other options.
        """
        options, other_options = self._options(), other._options()
        names = [name for name in {**options, **other_options} if options.get(name) != other_options.get(name)]
        differences = [
            f"{n} is {options.get(n, 'missing')} here, {other_options.get(n, 'missing')} there" for n in names
        ]
        if differences:
            raise StreamlineError(
                f"Cannot merge profiles: {'; '.join(differences)}. Expected the same model and options. Profile again "
                "with equal options."
            )
        self.sums.merge(other.sums)

    @property
    def num_boundaries(self) -> int:
        """Number of boundaries, one more than the number of blocks that were run."""
        return self.sums.num_boundaries

    @property
    def length(self) -> int:
        """Number of blocks of the stack."""
        return int(self.about.get("blocks", self.num_boundaries - 1))

    @property
    def tokens(self) -> int:
        """Number of counted tokens."""
        return int(self.sums.similarity.count[0])

    @property
    def sequences(self) -> int:
        """Number of sequences with a real token."""
        return int(self.sums.last.count[0])

    @property
    def resampled(self) -> bool:
        """Whether the profile has confidence intervals; see `replicates`."""
        try:
            return len(self.sums.drawn()) > 0
        except StreamlineError:
            return False

    @property
    def cosine(self) -> Tensor:
        """Mean cosine of the states at two boundaries, of shape (boundaries, boundaries), float64."""
        return self.matrix("cosine")

    @property
    def angular(self) -> Tensor:
        """Mean angular distance in [0, 1], of shape (boundaries, boundaries), float64."""
        return self.matrix("angular")

    @property
    def last_angular(self) -> Tensor:
        """Mean angular distance of each sequence's last real token, of shape (boundaries, boundaries), float64."""
        return self.matrix("last_angular")

    @property
    def relative_magnitude(self) -> Tensor:
        """Mean of ‖leaving − entering‖/‖entering‖ for each block, of shape (boundaries - 1,), float64."""
        self._require_counted()
        return self.sums.norms.relative_magnitude[0]

    @property
    def entropy(self) -> Tensor:
        """Entropy at each boundary in nats per feature, of shape (boundaries,), float64; see `StateEntropy`."""
        self._require_counted("entropy")
        return self.sums.entropy.mean[0]

    @property
    def norms(self) -> Tensor:
        """Mean norm at each boundary, of shape (boundaries,), float64."""
        self._require_counted()
        return self.sums.norms.mean[0]

    @property
    def median_norms(self) -> Tensor:
        """Median norm at each boundary, accurate to 2.2 %, of shape (boundaries,), float64; see `StateNorms`."""
        self._require_counted()
        return self.sums.norms.median

    @property
    def largest_norms(self) -> Tensor:
        """Largest norm at each boundary, of shape (boundaries,), float64."""
        self._require_counted()
        return self.sums.norms.largest.clone()

    @property
    def massive_activation_blocks(self) -> list[int]:
        """Indices of the blocks that create massive activations (Sun et al., arXiv 2402.17762).

        The largest norm of a token exceeds 20 times the median norm at the output of such a block, but not at its
        input. In a state of 2,500 features this is about one feature of 1,000 times the median magnitude, the
        definition of the paper. A window that contains such a block is hard to repair by a linear map. Only counted
        tokens are considered; skipped tokens may be massive.
        """
        massive = self.largest_norms > MASSIVE_NORM_RATIO * self.median_norms
        return [int(k) for k in (massive[1:] & ~massive[:-1]).nonzero().flatten()]

    @validate_arguments()
    def matrix(self, statistic: Statistic) -> Tensor:
        """Return a statistic of every window at once.

        Parameters
        ----------
        statistic : {"cosine", "angular", "last_angular", "relative_magnitude", "entropy"}
            The mean cosine or angular distance of the states before and after a window, the angular distance of the
            last real tokens, the sum of the relative magnitudes of the window's blocks, or the increase of entropy.

        Returns
        -------
        torch.Tensor
            Matrix of shape (boundaries, boundaries), float64, with the window ``range(a, b)`` at [a, b].

        Raises
        ------
        StreamlineError
            If no token was counted, or for the entropy no sequence with two counted tokens.
        """
        self._require_counted(statistic)
        return window_matrices(self.sums, statistic)[0]

    def value(self, statistic: Statistic, window: range) -> float:
        """Return a statistic of one window, see `matrix`.

        Raises `StreamlineError` if the profile does not cover the window.
        """
        self._require_covered(window)
        return float(self.matrix(statistic)[window.start, window.stop])

    @validate_arguments()
    def replicates(self, statistic: Statistic) -> Tensor:
        """Return a statistic of every window in each bootstrap resample of the sequences.

        The result is a float64 tensor of shape (replicates, boundaries, boundaries), without empty resamples. Raises
        `StreamlineError` if there are fewer than 20 replicates, or no two different sequences.
        """
        self._require_counted(statistic)
        return window_matrices(self.sums, statistic)[1 + self.sums.drawn()]

    @validate_arguments(level="(0, 1)")
    def interval(self, statistic: Statistic, window: range, level: float = 0.95) -> tuple[float, float]:
        """Return a bootstrap confidence interval for a statistic of a window.

        Parameters
        ----------
        statistic : str
            See `matrix`.
        window : range
        level : float
            Confidence level, between 0 and 1.

        Returns
        -------
        low, high : float
            Percentiles of the Poisson bootstrap over sequences, see `poisson_weights`.

        Raises
        ------
        StreamlineError
            As `value` and `replicates`.
        """
        self._require_covered(window)
        values = self.replicates(statistic)[:, window.start, window.stop]
        tails = torch.tensor([(1.0 - level) / 2, (1.0 + level) / 2], dtype=torch.float64)
        low, high = values.quantile(tails).tolist()
        return low, high

    def resamples(self) -> Iterator[Profile]:
        """Yield the profile of each bootstrap resample, to measure the uncertainty of results of a profile.

        Median norms, largest norms and `massive_activation_blocks` are those of all sequences. Raises as `replicates`.
        """
        self._require_counted()
        for number in self.sums.drawn().tolist():
            resampled = Profile(self.num_boundaries, about=self.about)
            resampled.sums = self.sums.resample(number)
            yield resampled

    def save(self, path: str | Path) -> Path:
        """Write the profile to a safetensors file and return its path."""
        header = {"format": _FORMAT, "version": version("streamline_hooks")}
        return write_file(path, self.sums.state_dict(), {"profile": {**header, **self._options()}})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a profile written by `save`.

        Raises `StreamlineError` if the file is not a profile, is damaged, or has another format.
        """
        tensors, values = read_file(path, "a profile")
        saved = values.get("profile")
        if not isinstance(saved, dict):
            raise StreamlineError(
                f"{path} contains {', '.join(values) or 'nothing'}. Expected a profile. Choose another file."
            )
        if saved.get("format") != _FORMAT:
            raise StreamlineError(
                f"{path} is a profile of format {saved.get('format')}, written by version {saved.get('version')}. "
                f"Expected format {_FORMAT}. Use that version, or profile again."
            )
        about = {name: value for name, value in saved.items() if name not in ("format", "version", *_SHAPE)}
        missing = next((name for name in _SHAPE if not isinstance(saved.get(name), int)), None)
        if missing:
            raise StreamlineError(f"{path} is damaged: {missing} is missing. Expected an integer. Profile again.")
        profile = cls(saved["places"], replicates=saved["replicates"], about=about)
        try:
            profile.sums.load_state_dict(tensors)
        except StreamlineError as error:
            raise StreamlineError(f"{path} is damaged: {error} Profile again.") from error
        return profile

    def __str__(self) -> str:
        return profile_table(self)

    def _options(self) -> dict[str, Any]:
        return {**self.about, **dict(zip(_SHAPE, (self.num_boundaries, self.sums.replicates), strict=True))}

    def _require_counted(self, statistic: str = "cosine") -> None:
        if not self.tokens:
            raise StreamlineError(
                "No token has been counted. Expected at least one. Call update with a batch that has real tokens."
            )
        if statistic == "entropy" and not self.sums.entropy.count[0]:
            raise StreamlineError(
                "The profile has one counted token per sequence. Expected at least two for the entropy. Profile with "
                "tokens='all'."
            )

    def _require_covered(self, window: range) -> None:
        if not isinstance(window, range) or window.step != 1 or not 0 <= window.start < window.stop:
            raise StreamlineError(
                f"{window} is not a window. Expected consecutive blocks such as range(3, 6). Change it."
            )
        name = f"The window of {describe_blocks(window)}"
        if window.stop > self.length:
            raise StreamlineError(
                f"{name} is out of range of the stack of {self.length} blocks, 0 to {self.length - 1}. Change it."
            )
        if window.stop >= self.num_boundaries:
            raise StreamlineError(
                f"{name} is not in this profile, which covers {describe_blocks(range(self.num_boundaries - 1))}: "
                "the others were protected and not run. Profile again without protect."
            )


_SHAPE = ("places", "replicates")  # keys in profile files: the number of boundaries and of bootstrap resamples


def profile_table(profile: Profile) -> str:
    """Return a table of each block's statistics, as a window of one block, and of its output norms."""
    model = f"{profile.about.get('model', 'a model')}, {profile.about.get('stack', 'its stack')}"
    count = f"{profile.tokens:,} tokens of {profile.sequences:,} sequences"
    heading = f"{model}: {profile.num_boundaries - 1} of {profile.length} blocks, {count}"
    if not profile.tokens:
        return heading
    matrices = [window_matrices(profile.sums, name)[0].diagonal(1) for name in get_args(Statistic)]
    statistics = torch.stack([*matrices, profile.median_norms[1:], profile.largest_norms[1:]], dim=1).tolist()
    rows = []
    for k, (cosine, angular, last, magnitude, entropy, median, largest) in enumerate(statistics):
        numbers = [f"{value:.4f}" for value in (cosine, angular, last, magnitude)]
        note = "creates massive activations" if k in profile.massive_activation_blocks else ""
        rows.append([k, *numbers, f"{entropy:+.4f}", f"{median:.4g}", f"{largest:.4g}", note])
    columns = ["block", "cosine", "angular", "last token", "magnitude", "entropy", "median norm", "largest", ""]
    return f"{heading}\n{table(rows, columns)}"
