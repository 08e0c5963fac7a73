"""What a closed-form repair needs, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.blockwise.passing import BlockwisePass
from streamline_hooks.blockwise.room import require_room, state_bytes
from streamline_hooks.stack import find_stack
from streamline_hooks.statistics import WindowMoments
from streamline_hooks.statistics.storage import read_file, write_file


@checked()
def measure_moments(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    windows: Sequence[range],
    *,
    stack: str | None = None,
    weighted: bool = True,
    what: str = "moments",
    memory: int = 2**31,
    folder: str | Path | None = None,
    check: bool = True,
) -> list[WindowMoments]:
    """Sum the moments of windows, as `streamline_hooks.statistics.measure_moments` does in memory.

    What is kept are the states that enter and leave the block in memory, and those that enter a window which is not
    over yet.

    Parameters
    ----------
    model : torch.nn.Module
        From `open_checkpoint`.
    batches, windows, stack, weighted, what
        As for `streamline_hooks.statistics.measure_moments`.
    memory, folder, check
        As for `profile`.

    Returns
    -------
    list of WindowMoments
        One a window.

    Raises
    ------
    UnsupportedSurgery
        If the model cannot be run block by block.
    StreamlineError
        If a window is out of range, a state is not finite, or there is no room for the states.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> sums, _ = measure_moments(tiny_model("llama"), [torch.arange(3, 43).view(4, 10)], [range(1, 3), range(2, 5)])
    >>> sums.tokens
    40
    """
    found = find_stack(model, stack)
    room, stop = None if folder is None else Path(folder), max(w.stop for w in windows)
    held = max(2 + len({w.start for w in windows if w.start < k < w.stop}) for k in range(stop))
    require_room(held * sum(state_bytes(found, list(batches))), memory, room)
    run = {"windows": [[w.start, w.stop] for w in windows], "weighted": weighted}
    sums: dict[range, WindowMoments] = {}
    with BlockwisePass(
        model, batches, stop=stop, memory=memory, folder=room, check=check, run=run, stack=stack,
        what=f"{what}: {len(windows)} windows",
    ) as states:  # fmt: skip
        for place in states:
            for window in {w for w in windows if w.stop <= place and w not in sums}:
                file = None if room is None else room / f"window_{window.start}_{window.stop}.safetensors"
                if file is not None and (file.is_file() or window.stop < place):
                    sums[window] = _load(file)
                    continue
                one = WindowMoments(states.read(place, 0).shape[-1], weighted)
                for number, mask in enumerate(states.masks):
                    one.update(states.read(window.start, number), states.read(place, number), mask)
                sums[window] = one
                if file is not None:
                    save_sums(one, file)
            waiting = {w.start for w in windows if w.stop > place}
            for earlier in set(range(place)) - waiting:
                states.drop(earlier)
        states.done()
    return [sums[window] for window in windows]


def save_sums(sums: WindowMoments, file: Path) -> None:
    """Write the sums of a window to a file."""
    kept = sums.state_dict()
    write_file(file, {name: kept.pop(name).cpu() for name in ("xx", "xd")}, kept)


def _load(file: Path) -> WindowMoments:
    tensors, values = read_file(file, "the moments of a window")
    sums = WindowMoments(len(tensors["xx"]), values["weighted"])
    sums.load_state_dict({**tensors, **values})
    return sums
