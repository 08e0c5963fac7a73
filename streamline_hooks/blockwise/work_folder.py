"""The folder of a compression: what is found is kept there step by step, so that another process goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from streamline_hooks.blockwise.journal import Journal
from streamline_hooks.blockwise.repairing import packed, unpacked
from streamline_hooks.errors import StreamlineError
from streamline_hooks.evaluation import Perplexity
from streamline_hooks.repair import ReplacementConfig
from streamline_hooks.selection import VerifiedSelection
from streamline_hooks.stack import BlockStack
from streamline_hooks.statistics import Profile
from streamline_hooks.statistics.storage import read_file, write_file

_PROFILE, _JUDGED, _MEASURED = "profile.safetensors", "judged.safetensors", "perplexity.safetensors"

Profiler = Callable[[Path | None, Callable[[Profile], None]], Profile]
Verifier = Callable[[Path | None, Callable[[list[VerifiedSelection]], None]], list[VerifiedSelection]]
Measured = tuple[Perplexity, list[Perplexity]]
Measurer = Callable[[Path | None, Callable[[Measured], None]], Measured]


class WorkFolder:
    """What a compression has found so far. A file is there when its step is done, and then the step is not run.

    What makes something is given a folder of its own, and what is to be called with the finding before that folder
    goes: a process that is killed in between has one of the two.

    Parameters
    ----------
    folder : Path, optional
        Of this compression alone; without one nothing is kept.
    run : mapping
        What it is of, as JSON values. What differs in it is not gone on with.

    Raises
    ------
    StreamlineError
        If the folder holds something else, or is of other arguments.
    """

    def __init__(self, folder: Path | None, run: Mapping[str, Any]) -> None:
        self._folder = folder
        self._journal = None if folder is None else Journal(folder, run)

    def profile(self, make: Profiler) -> Profile:
        """The profile, which `make` makes."""
        file = self._at(_PROFILE)
        if file is not None and file.is_file():
            return Profile.load(file)

        def kept(made: Profile) -> None:
            if file is not None:
                made.save(file)

        return make(self._at("profile"), kept)

    def judged(self, stack: BlockStack, kind: ReplacementConfig, make: Verifier) -> list[VerifiedSelection]:
        """The windows that were repaired and judged, the best first.

        Parameters
        ----------
        stack : BlockStack
        kind : ReplacementConfig
            What stands in their places.
        make : callable
            Makes them.
        """
        file = self._at(_JUDGED)
        if file is not None and file.is_file():
            return _read(stack, kind, file)

        def kept(judged: list[VerifiedSelection]) -> None:
            if file is not None:
                _write(judged, file)

        return make(self._at("verify"), kept)

    def perplexities(self, names: list[str], make: Measurer) -> dict[str, float]:
        """Perplexities by name, ``original`` and these, which `make` measures."""
        file, names = self._at(_MEASURED), ["original", *names]
        if file is not None and file.is_file():
            _, said = read_file(file, "perplexities")
            if list(said) != names:
                raise StreamlineError(f"{file} holds {', '.join(said)}; expected {', '.join(names)}. Delete it.")
            return {name: Perplexity(*pair).value for name, pair in said.items()}

        def kept(measured: Measured) -> None:
            if file is not None:
                each = zip(names, [measured[0], *measured[1]], strict=True)
                write_file(file, {}, {name: [one.nll, one.tokens] for name, one in each})

        original, each = make(self._at("measure"), kept)
        return {name: one.value for name, one in zip(names, [original, *each], strict=True)}

    def clear(self) -> None:
        """Take away what was kept, and the folder if nothing else is in it."""
        if self._folder is None or self._journal is None:
            return
        for name in (_PROFILE, _JUDGED, _MEASURED):
            (self._folder / name).unlink(missing_ok=True)
        for name in ("profile", "verify", "measure"):  # of a step that was killed when it was done
            if (self._folder / name).is_dir():
                shutil.rmtree(self._folder / name)
        self._journal.clear()

    def _at(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / name


def _write(judged: list[VerifiedSelection], file: Path) -> None:
    tensors: dict[str, Tensor] = {}
    rows = []
    for k, one in enumerate(judged):
        (repair,) = one.repairs
        weights, numbers = packed(repair, f"{k}.")
        tensors.update(weights)
        rows.append(
            {
                "window": [repair.window.start, repair.window.stop],
                "score": one.score,
                "distance": one.distance,
                **numbers,
            }
        )
    write_file(file, tensors, {"judged": rows})


def _read(stack: BlockStack, kind: ReplacementConfig, file: Path) -> list[VerifiedSelection]:
    tensors, said = read_file(file, "windows that were judged")
    found = []
    for k, row in enumerate(said["judged"]):
        window = range(*row["window"])
        repair = unpacked(stack, kind, window, tensors, row, f"{k}.")
        found.append(VerifiedSelection((window,), score=row["score"], repairs=(repair,), distance=row["distance"]))
    return found
