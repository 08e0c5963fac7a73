"""Measurements in a file, line by line."""

from __future__ import annotations

from pathlib import Path

from streamline_hooks.errors import StreamlineError
from streamline_hooks.in_training.measurement import Measurement


class MeasurementFile:
    """A JSON Lines file that measurements are added to.

    What is there already is kept, but for an incomplete measurement at its end, which a process left that was killed
    while it wrote.

    Parameters
    ----------
    path : str or Path
        The file; its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._looked_at = False

    def append(self, measured: Measurement) -> None:
        """Add a line, and see to it that it is out of this process's hands.

        Raises
        ------
        StreamlineError
            If the file cannot be written.
        """
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
