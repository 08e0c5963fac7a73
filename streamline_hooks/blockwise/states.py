"""States at places of the residual stream, batch by batch: in memory while they fit, and then in files."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import safe_open
from torch import Tensor

from streamline_hooks.errors import StreamlineError
from streamline_hooks.statistics.storage import write_file


class StateStore:
    """Keeps the states of each batch at each place until they are dropped.

    A file holds one batch at one place. Reading maps it, so that what is in memory is what is looked at, and the
    system can take it back.

    Parameters
    ----------
    memory : int
        Bytes of states that may be in memory. What is more goes to files in a temporary folder.
    folder : Path, optional
        Keep all states in files here, so that another process can go on with them.
    beside : str or Path, optional
        Where to make the temporary folder, by default where the system has them.
    """

    def __init__(self, memory: int, folder: Path | None = None, beside: str | Path | None = None) -> None:
        self._memory, self._folder, self._beside = memory, folder, beside
        self._held: dict[tuple[int, int], Tensor] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def keep(self, place: int, batch: int, state: Tensor) -> None:
        """Keep a state, of shape (batch, tokens, features).

        Raises
        ------
        StreamlineError
            If a file cannot be written.
        """
        size = state.numel() * state.element_size()
        if self._folder is None and size + self.in_memory <= self._memory:
            self._held[place, batch] = state.detach().to("cpu", copy=True)
            return
        content, about = {"states": state.detach().cpu()}, {"place": place, "batch": batch}
        write_file(self._file(place, batch), content, about, sync=self._folder is not None)

    def read(self, place: int, batch: int) -> Tensor:
        """A state that was kept, which is not to be changed.

        Raises
        ------
        StreamlineError
            If its file is gone or damaged.
        """
        if (place, batch) in self._held:
            return self._held[place, batch]
        file = self._file(place, batch)
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor("states")
        except Exception as error:  # safetensors raises its own, and OSError
            raise StreamlineError(
                f"{file} cannot be read: {error}. Delete {file.parent.parent} and begin again."
            ) from error

    def drop(self, place: int) -> None:
        """Forget the states at a place."""
        for key in [key for key in self._held if key[0] == place]:
            del self._held[key]
        if self._folder is not None or self._temporary is not None:
            shutil.rmtree(self._file(place, 0).parent, ignore_errors=True)

    @property
    def in_memory(self) -> int:
        """Bytes of the states that are in memory."""
        return sum(state.numel() * state.element_size() for state in self._held.values())

    def _file(self, place: int, batch: int) -> Path:
        folder = self._folder
        if folder is None:
            if self._temporary is None:
                self._temporary = tempfile.TemporaryDirectory(suffix=".states", dir=self._beside)
            folder = Path(self._temporary.name)
        return folder / f"place_{place:04d}" / f"batch_{batch:06d}.safetensors"
