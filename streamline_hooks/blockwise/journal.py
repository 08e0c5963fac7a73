"""How far a pass has come, in a small file that is always whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamline_hooks.checkpoint.safety import read_json
from streamline_hooks.errors import StreamlineError
from streamline_hooks.json_file import write_json

FILE = "pass.json"
_FORMAT = 1
_WRITTEN = ("place_*", "window_*.safetensors", "truth.safetensors")


class Journal:
    """Says in a folder which place all batches have come to.

    Parameters
    ----------
    folder : Path
        Of this pass alone; made where it is missing.
    run : mapping
        What the pass is of, as JSON values. What differs in it is not gone on with.

    Attributes
    ----------
    place : int or None
        The last place whose states are all there; None at the beginning.

    Raises
    ------
    StreamlineError
        If the folder holds something else, or the states of another pass.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self._file = folder / FILE
        self._run: dict[str, Any] = json.loads(json.dumps({"format": _FORMAT, **run}))
        self.place: int | None = None
        if self._file.is_file():
            self._take_up()
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StreamlineError(
                f"{folder} is not empty and holds no {FILE}, so that it is of no interrupted pass. Name a new folder."
            )
        else:
            write_json(self._file, {"run": self._run, "place": None})

    def advance(self, place: int) -> None:
        """All states at a place are there."""
        write_json(self._file, {"run": self._run, "place": place})
        self.place = place

    def clear(self) -> None:
        """Take away what the pass has written, and the folder if nothing else is in it."""
        for pattern in _WRITTEN:
            for path in self._file.parent.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        self._file.unlink(missing_ok=True)
        if not any(self._file.parent.iterdir()):
            self._file.parent.rmdir()

    def _take_up(self) -> None:
        said = read_json(self._file)
        before, place = said.get("run"), said.get("place")
        if not isinstance(before, dict) or not (place is None or isinstance(place, int)):
            raise StreamlineError(f"{self._file} is damaged. Delete {self._file.parent} and begin again.")
        differ = [
            f"{name} was {before.get(name, 'absent')} and is {self._run.get(name, 'absent')}"
            for name in {**before, **self._run}
            if before.get(name) != self._run.get(name)
        ]
        if differ:
            raise StreamlineError(
                f"{self._file.parent} holds the states of another pass: {'; '.join(differ)}. Name another folder, or "
                "delete this one."
            )
        self.place = place
