"""What a pass will take in time and memory, told before it is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.errors import StreamlineError

_FLOAT64 = 8
_WORKING = 3  # a block's widest activation, how often it is there at once: gate, up, and their product


@dataclass(frozen=True)
class Cost:
    """What a pass will take, about.

    Attributes
    ----------
    what : str
    tokens : int
        Places of all batches, padding among them, which is run as well.
    seconds : float
    bytes : int
        Above the model, at the most.
    """

    what: str
    tokens: int
    seconds: float
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        """One pass after the other: seconds add up, memory is that of the larger."""
        return Cost(
            f"{self.what}, {other.what}",
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            max(self.bytes, other.bytes),
        )

    def __mul__(self, times: int) -> Cost:
        """The same pass so many times, one after the other."""
        what = self.what if times == 1 else f"{self.what}, {times} times"
        return Cost(what, times * self.tokens, times * self.seconds, self.bytes)

    def __str__(self) -> str:
        return f"{self.what}: {_thousands(self.tokens)} tokens, about {_duration(self.seconds)}, {_size(self.bytes)}"


@dataclass(frozen=True)
class Pace:
    """How fast the parts of a model are here, and the sizes of its states; it tells what each pass will take.

    `measure_pace` makes one. The batches of a pass are looked at for their shapes alone.

    Attributes
    ----------
    before, after : float
        Seconds a token ahead of the first block (embedding, masks), and behind the last (final norm and head).
    blocks : tuple of float
        Seconds a token of each block.
    similarity, moments, reference, divergence, likelihood : float
        Seconds a token of the sums over all L + 1 states, of one window's moments, of the original's
        log-probabilities, of one candidate's KL from them, and of a perplexity.
    surgery : float
        Seconds to take blocks out for one batch.
    features, widest, vocabulary : int
        Of a state, of a block's widest weight, and of the logits (0 without a head).
    state_size, logit_size : int
        Bytes a number.
    """

    before: float
    blocks: tuple[float, ...]
    after: float
    similarity: float
    moments: float
    reference: float
    divergence: float
    likelihood: float
    surgery: float
    features: int
    widest: int
    vocabulary: int
    state_size: int
    logit_size: int

    def rank(self, batches: Sequence[Batch | Tensor]) -> Cost:
        """Of `profile`: every block, and no head."""
        tokens, largest = _tokens(batches)
        places = len(self.blocks) + 1
        # The inner products of each token's states, their upper halves as cosines, and what they are made in.
        sums = 2 * largest * places**2 * _FLOAT64 + min(largest * places * self.features * _FLOAT64, 2**24)
        kept = places * self._state(largest)
        seconds = self.before + sum(self.blocks) + self.similarity
        return Cost("rank", tokens, tokens * seconds, kept + max(sums, self._working(largest)))

    def fit(
        self,
        batches: Sequence[Batch | Tensor],
        windows: Sequence[range],
        *,
        shortlist: int | None = None,
        sums: int = 1,
        replacement: nn.Module | None = None,
        beside: bool = False,
    ) -> Cost:
        """Of `measure_moments`: the blocks up to the last that a window needs, and no head.

        Parameters
        ----------
        batches : sequence of mapping or torch.Tensor
        windows : sequence of range
            The windows, or those that a shortlist will be taken from.
        shortlist : int, optional
            How many will be taken, where it is not known which; then the last of `windows` counts as one of them.
        sums : int
            How many sums of each window will be in memory, those of an earlier pass (to hold out) among them.
        replacement : torch.nn.Module, optional
            What stands in a window's place.
        beside : bool
            Whether it is run beside each window, so that its last projection can be solved for.
        """
        tokens, largest = _tokens(batches)
        count = _count(windows, shortlist)
        needed = {w.start for w in windows} | {w.stop - 1 for w in windows}
        places = min(len({k + step for k in needed for step in (0, 1)}), 4 * count)
        sizes = [p.shape for p in replacement.parameters() if p.ndim > 1] if replacement is not None and beside else []
        inputs = max((max(shape[-2:]) for shape in sizes), default=self.features)
        entries = inputs * (inputs + self.features)
        moments = self.moments * entries / (2 * self.features**2)
        extra = sum(math.prod(shape) for shape in sizes) * self._seconds_a_parameter() if sizes else 0.0
        seconds = self.before + sum(self.blocks[: max(needed) + 1]) + count * (moments + extra)
        chunk = min(largest, 4096) * (4 * self.features + inputs) * _FLOAT64
        held = sums * count * entries * _FLOAT64 + (places + 2) * self._state(largest)
        what = f"fit {count} windows"
        return Cost(what, tokens, tokens * seconds, held + max(chunk, self._working(largest)))

    def judge(
        self,
        batches: Sequence[Batch | Tensor],
        windows: Sequence[range],
        *,
        shortlist: int | None = None,
        replacement: nn.Module | None = None,
        whole: bool = False,
    ) -> Cost:
        """Of `distances_of_candidates`: the whole model once, and the blocks after each window with the head.

        Parameters
        ----------
        batches : sequence of mapping or torch.Tensor
        windows : sequence of range
            The windows, or those that a shortlist will be taken from.
        shortlist : int, optional
            How many will be taken, where it is not known which; then the mean of `windows` counts that often.
        replacement : torch.nn.Module, optional
            What stands in a window's place (a matrix of features × features counts by its share of a block's work).
        whole : bool
            Whether all blocks but the window's are run, since it is put into the model.

        Raises
        ------
        StreamlineError
            If the model has no head.
        """
        self._require_head()
        tokens, largest = _tokens(batches)
        count = _count(windows, shortlist)
        original = self.before + sum(self.blocks) + self.after + self.reference
        each = self._with_one_gone(windows, replacement, whole) + self.divergence
        starts = min(len({w.start for w in windows}), count)
        # The original's logits and their log-probabilities in float32, two candidates' logits.
        logits = largest * self.vocabulary * (3 * self.logit_size + 4)
        kept = starts * self._state(largest) + max(logits, self._working(largest))
        seconds = tokens * (original + count * each) + len(batches) * count * self.surgery
        return Cost(f"judge {count} windows", tokens, seconds, kept)

    def attempts(
        self,
        batches: Sequence[Batch | Tensor],
        windows: Sequence[range],
        count: int,
        *,
        replacement: nn.Module | None = None,
        whole: bool = False,
    ) -> Cost:
        """So many perplexities with one of the windows gone, whichever it is, repaired or not, as `judge` runs them.

        Raises
        ------
        StreamlineError
            If the model has no head.
        """
        self._require_head()
        tokens, largest = _tokens(batches)
        each = self._with_one_gone(windows, replacement, whole) + self.likelihood
        kept = self._state(largest) + max(2 * largest * self.vocabulary * self.logit_size, self._working(largest))
        seconds = count * (tokens * each + len(batches) * self.surgery)
        return Cost(f"measure up to {count} candidates", tokens, seconds, kept)

    def train(
        self,
        batches: Sequence[Batch | Tensor],
        validation: Sequence[Batch | Tensor],
        windows: Sequence[range],
        *,
        epochs: float = 1,
        validations: int = 1,
        logits: bool = True,
        replacement: nn.Module | None = None,
        healed: bool = False,
    ) -> Cost:
        """Of `train`: the original once, and the blocks after the window forward and backward each epoch.

        Parameters
        ----------
        batches, validation : sequence of mapping or torch.Tensor
        windows : sequence of range
            Those of which one will be trained for; the mean of them counts.
        epochs : float
        validations : int
            How often `batches` are trained on, and `validation` is looked at beyond the first time.
        logits : bool
            Whether what the model says is compared; else nothing is run after the window.
        replacement : torch.nn.Module, optional
            What stands in the window's place.
        healed : bool
            Whether blocks that stay are trained too, which doubles what is done on their way back.

        Raises
        ------
        StreamlineError
            If the model has no head.
        """
        self._require_head()
        (tokens, largest), (apart, widest) = _tokens(batches), _tokens(validation)
        stand_in = sum(p.numel() for p in replacement.parameters()) if replacement is not None else 0
        own = stand_in * self._seconds_a_parameter()
        rest = sum(sum(self.blocks[w.stop :]) for w in windows) / len(windows)
        upto = sum(sum(self.blocks[: w.stop]) for w in windows) / len(windows)
        # The original's head is run on the state that leaves its last block, which carries it and is run in vain.
        said = self.blocks[-1] + self.after + self.reference
        forward = rest + self.after + own
        looked = said + self.before + forward + self.divergence
        step = said + self.before + (3 if healed else 2) * forward + own + 2 * self.divergence
        if not logits:
            step = self.before + 3 * own
        original = self.before + (sum(self.blocks) if logits else upto)
        seconds = tokens * (original + epochs * step) + apart * (self.before + sum(self.blocks))
        seconds += apart * (1 + validations) * looked
        states = 2 * self._state(tokens + apart)
        made = max(largest, widest) * self.vocabulary * (3 * self.logit_size + 4)
        passed = largest * len(self.blocks) * self.features * self.state_size  # a few states a block, for the way back
        return Cost("train", round(tokens * epochs), seconds, states + made + 8 * passed + 4 * 4 * stand_in)

    def perplexity(self, batches: Sequence[Batch | Tensor]) -> Cost:
        """Of `perplexity`: the whole model with its head.

        Raises
        ------
        StreamlineError
            If the model has no head.
        """
        self._require_head()
        tokens, largest = _tokens(batches)
        seconds = self.before + sum(self.blocks) + self.after + self.likelihood
        logits = largest * self.vocabulary * self.logit_size
        return Cost("perplexity", tokens, tokens * seconds, max(logits, self._working(largest)))

    def _state(self, tokens: int) -> int:
        return tokens * self.features * self.state_size

    def _working(self, tokens: int) -> int:
        return _WORKING * tokens * self.widest * self.state_size

    def _with_one_gone(self, windows: Sequence[range], replacement: nn.Module | None, whole: bool) -> float:
        """Seconds a token of a forward without one of the windows, on average, and with what stands in its place."""
        # The last block carries the states that have passed the stack, and is run in vain.
        rest = sum(sum(self.blocks[w.stop :]) or self.blocks[-1] for w in windows) / len(windows)
        if whole:
            rest = sum(self.blocks) - sum(sum(self.blocks[w.start : w.stop]) for w in windows) / len(windows)
        stand_in = sum(p.numel() for p in replacement.parameters()) if replacement is not None else 0
        return self.before + rest + self.after + stand_in * self._seconds_a_parameter()

    def _seconds_a_parameter(self) -> float:
        """Of a dense matrix: as the head's, which is one."""
        return self.after / (self.features * self.vocabulary)

    def _require_head(self) -> None:
        if not self.vocabulary:
            raise StreamlineError("The model returned no logits when it was timed; give one with its LM head.")


def shape_of(batch: Batch | Tensor) -> tuple[int, int]:
    """Sequences and places of a batch of tokens."""
    first = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    if first is None or first.ndim != 2:
        raise StreamlineError("A cost is told of batches of tokens: give input_ids of shape (batch, tokens).")
    return first.shape[0], first.shape[1]


def _tokens(batches: Sequence[Batch | Tensor]) -> tuple[int, int]:
    """The places of all batches, and of the largest."""
    sizes = [rows * width for rows, width in map(shape_of, batches)]
    if not sizes:
        raise StreamlineError("There is no batch; give those that the pass would run.")
    return sum(sizes), max(sizes)


def _count(windows: Sequence[range], shortlist: int | None) -> int:
    if not windows or (shortlist is not None and shortlist < 1):
        raise StreamlineError(f"Got {len(windows)} windows and shortlist={shortlist}; expected one or more.")
    return len(windows) if shortlist is None else min(shortlist, len(windows))


def _thousands(count: int) -> str:
    return f"{count / 1000:.0f}k" if count >= 1000 else str(count)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    return (f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB") + " above the model"
