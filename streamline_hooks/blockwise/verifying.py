"""The verified shortlist of windows, repaired and judged in one pass with one block in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.blockwise.judging import judge
from streamline_hooks.blockwise.measuring import in_its_place
from streamline_hooks.blockwise.passing import BlockwisePass, Journey
from streamline_hooks.blockwise.repairing import load_repair, require_map_kind, save_repair, solve_window
from streamline_hooks.blockwise.room import require_room, state_bytes
from streamline_hooks.errors import StreamlineError
from streamline_hooks.repair import LinearConfig, Repair, ReplacementConfig
from streamline_hooks.selection import Selection, VerifiedSelection
from streamline_hooks.stack import find_stack
from streamline_hooks.statistics import WindowMoments

Batches = Sequence[Batch | Tensor]


@checked()
def verified(
    model: nn.Module,
    selections: Sequence[Selection],
    fit: Batches,
    held_out: Batches,
    validation: Batches,
    *,
    replacement: ReplacementConfig = LinearConfig(),
    stack: str | None = None,
    memory: int = 2**31,
    folder: str | Path | None = None,
    check: bool = True,
    before_done: Callable[[list[VerifiedSelection]], None] = lambda judged: None,
) -> list[VerifiedSelection]:
    """Repair windows by least squares and judge them by KL, as `streamline_hooks.selection.verified` does in memory.

    All three texts go through the blocks together. Where a window ends, its moments are summed, it is solved for, and
    what stands in its place makes another state of the validation text of the one that enters the window, which goes
    through the blocks that are left beside the original's. So every block is read once; the last one again for what
    follows the blocks, and all of them once more by a check. Two d×d matrices in float64 for each of the two parts of
    the text are in memory, of one window at a time.

    Parameters
    ----------
    model : torch.nn.Module
        From `open_checkpoint`.
    selections : sequence of Selection
        Of a single window each, such as a search for windows finds.
    fit, held_out, validation, stack
        As for `streamline_hooks.selection.verified`.
    replacement : ReplacementConfig
        What starts at the least-squares map: none, linear, mlp, swiglu.
    memory, folder, check
        As for `profile`.
    before_done : callable
        Is given what is returned while the states are still there, so that it can be kept before they go.

    Returns
    -------
    list of VerifiedSelection
        The best first; those that leave no finite logits last.

    Raises
    ------
    UnsupportedSurgery
        If the model cannot be run block by block, or the kind does not start at the least-squares map.
    StreamlineError
        If a selection is not a single window, there is no room for the states, or not one leaves finite logits.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> fit, held_out, validation = ([torch.arange(seed, seed + 24).view(2, 12)] for seed in (3, 13, 23))
    >>> shortlist = [Selection((range(1, 3),)), Selection((range(2, 4),))]
    >>> best, other = verified(tiny_model("llama"), shortlist, fit, held_out, validation)
    >>> best.distance <= other.distance
    True
    """
    found, chosen = find_stack(model, stack), replacement
    windows = [_single(selection) for selection in selections]
    if len(set(windows)) < len(windows) or not windows:
        raise StreamlineError(f"Got {len(windows)} windows, {len(set(windows))} of them different; give each once.")
    require_map_kind(found, chosen, windows[0])
    batches, length = [*fit, *held_out, *validation], len(found)
    fitted = range(len(fit))
    apart = range(len(fit), len(fit) + len(held_out))
    judged_on = range(apart.stop, len(batches))
    last = max(window.stop for window in windows)
    others = {
        window: range(len(batches) + k * len(validation), len(batches) + (k + 1) * len(validation))
        for k, window in enumerate(windows)
    }
    room = None if folder is None else Path(folder)
    require_room(_bytes(state_bytes(found, batches), judged_on.start, windows, length), memory, room)
    repairs: dict[range, Repair] = {}
    with BlockwisePass(
        model,
        batches,
        memory=memory,
        folder=room,
        check=check,
        run={"kind": chosen.name, "windows": [[w.start, w.stop] for w in windows]},
        ends=[last] * judged_on.start + [length] * len(validation),
        others=[Journey(number, window.stop, length) for window in windows for number in judged_on],
        stack=stack,
        what=f"fit and judge: {len(windows)} windows",
    ) as states:
        for place in states:
            for window in windows:
                if window.stop > place or window in repairs:
                    continue
                file = None if room is None else room / f"window_{window.start}_{window.stop}.safetensors"
                if file is not None and (file.is_file() or window.stop < place):
                    repairs[window] = load_repair(found, chosen, window, file)
                    continue
                parts = (_moments(states, part, window) for part in (fitted, apart))
                repair = repairs[window] = solve_window(found, chosen, window, *parts)
                module = repair.stand_in if isinstance(repair.stand_in, nn.Module) else None
                for number, batch in zip(others[window], judged_on, strict=True):
                    states.put(number, in_its_place(module, states.read(window.start, batch)))
                if file is not None:  # says that the states are there too
                    save_repair(repair, file)
            waiting = {window.start for window in windows if window.stop > place}
            for earlier in set(range(place)) - waiting:
                states.drop(earlier)
        distances = judge(states, judged_on, [others[window] for window in windows])
        judged = [
            VerifiedSelection((window,), score=selection.score, repairs=(repairs[window],), distance=distance)
            for selection, window, distance in zip(selections, windows, distances, strict=True)
        ]
        judged.sort(key=lambda one: (not math.isfinite(one.distance), one.distance))
        if not math.isfinite(judged[0].distance):
            raise StreamlineError(
                f"Not one of the {len(judged)} shortlisted windows leaves a model with finite logits. Remove less, "
                "protect other blocks, or run in a wider precision (float32 or bfloat16)."
            )
        before_done(judged)
        states.done()
    return judged


def _single(selection: Selection) -> range:
    if len(selection.windows) != 1 or selection.silenced:
        raise StreamlineError(
            f"{selection} is not a single window, and nothing else is repaired block by block. Search for windows, or "
            "load the model into memory."
        )
    return selection.windows[0]


def _moments(states: BlockwisePass, batches: range, window: range) -> WindowMoments:
    sums = WindowMoments(states.read(window.start, batches[0]).shape[-1])
    for number in batches:
        sums.update(states.read(window.start, number), states.read(window.stop, number), states.masks[number])
    return sums


def _bytes(sizes: Sequence[int], fitted: int, windows: Sequence[range], length: int) -> int:
    """Bytes of the states that are there at once, at most: of the texts and, behind their windows, of candidates."""
    most, last = 0, max(window.stop for window in windows)
    for k in range(length):
        places = 2 + len({w.start for w in windows if w.start < k < w.stop})
        others = 2 * sum(w.stop <= k + 1 for w in windows)
        texts = places * (sum(sizes) if k < last else sum(sizes[fitted:]))
        most = max(most, texts + others * sum(sizes[fitted:]))
    return most
