"""Measurements in a file, line by line."""

from __future__ import annotations

from pathlib import Path

from streamline_hooks.errors import StreamlineError
from streamline_hooks.in_training.measurement import Measurement


class MeasurementFile:
    """A JSON Lines file that measurements are added to.

    What is there already is kept, but for an incomplete last line that a process left which was killed while it wrote.

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
        if self.path.exists():
            with self.path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
