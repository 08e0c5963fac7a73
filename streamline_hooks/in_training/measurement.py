"""The measurement of one training step, and the JSON Lines file that measurements are appended to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from streamline_hooks.errors import StreamlineError


@dataclass(frozen=True)
class Measurement:
    """The hidden states of one training step, over all of its batches.

    What cannot be told is None: the value of a block that was not called, or of a place whose states are all not
    finite, or the gradient of one that none has passed.

    Attributes
    ----------
    step : int
        The number of the step, counted from 1.
    tokens : int
        Tokens that were counted, over all processes; in a model that calls its blocks several times a forward, as
        often as they are called.
    cosine : tuple of float
        Mean cosine of the states at neighbouring places, those that enter and leave a block; one a block.
    influence : tuple of float
        Block influence, 1 − cosine (ShortGPT, arXiv 2403.03853, eq. 1); one a block.
    change : tuple of float
        Mean of ‖leaving − entering‖/‖entering‖; one a block.
    norm, median_norm, largest_norm : tuple of float
        Of the states, at each of the L + 1 places: what enters block 0, then what leaves each block. The median is
        right to 2.2 %.
    gradient_norm : tuple of float
        The norm of the loss's gradient with regard to all states at a place together, at each of the L + 1 places. In
        the padding it is 0, but where a padded place predicts the first real token behind it. A block that a forward
        goes without (`StochasticDepth`) hands on the state that entered it. None where two backwards went through one
        forward, and where it is not known that a block was passed over, see `PlaceProbes`.
    massive : tuple of int
        The blocks in which massive activations are born: at their exit, but not at their entrance, the greatest norm
        is above 20 times the median norm; see `Profile.massive_births`.
    dead : tuple of int
        The blocks that hardly change the state; see `HiddenStateMonitor`.
    not_finite : tuple of int
        The places with a NaN or infinite state.
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
        """The values by name, for a logger: ``states/influence/07`` and so on, and how many blocks are dead.

        Parameters
        ----------
        prefix : str
            Of every name.

        Returns
        -------
        dict of str to float
            Without those that cannot be told.

        Examples
        --------
        >>> one = Measurement(1, 8, (0.9,), (0.1,), (0.5,), (1.0, 2.0), (1.0, 2.0), (3.0, 4.0), (None, 0.2))
        >>> {name: value for name, value in one.scalars().items() if "norm" not in name}["states/influence/0"]
        0.1
        """
        found: dict[str, float] = {}
        for name in _SERIES:
            values: Sequence[float | None] = getattr(self, name)
            digits = len(str(len(values) - 1))
            found |= {f"{prefix}/{name}/{k:0{digits}}": v for k, v in enumerate(values) if v is not None}
        for name in _BLOCKS:
            found[f"{prefix}/{name}"] = float(len(getattr(self, name)))
        return found

    def line(self) -> str:
        """All of it as one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"


_SERIES = ("cosine", "influence", "change", "norm", "median_norm", "largest_norm", "gradient_norm")
_BLOCKS = ("massive", "dead", "not_finite")


def told(value: float | None) -> float | None:
    """A value, or None where it is no number."""
    return value if value is not None and math.isfinite(value) else None


class MeasurementFile:
    """A JSON Lines file that measurements are appended to.

    Existing lines stay, except an incomplete last line, left by a process that was killed while it wrote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._looked_at = False

    def append(self, measured: Measurement) -> None:
        """Append a measurement and flush it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._looked_at:
                self._drop_incomplete_line()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(measured.line())
        except OSError as error:
            raise StreamlineError(f"{self.path} cannot be written: {error}. Name another file.") from error
        self._looked_at = True

    def _drop_incomplete_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _LONGEST))
            rest = file.read().rpartition(b"\n")[2]
            if not rest.startswith(_BEGINNING[: len(rest)]):
                raise StreamlineError(
                    f"{self.path} does not end with a line of measurements, but with {rest[:40]!r}. Name another file."
                )
            file.truncate(size - len(rest))


_BEGINNING = b'{"step": '
_LONGEST = 2**20  # bytes of a line; thousands of blocks
