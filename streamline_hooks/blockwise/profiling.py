"""What chooses windows, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch
from streamline_hooks.blockwise.passing import BlockwisePass
from streamline_hooks.blockwise.residence import identity_of
from streamline_hooks.blockwise.room import parts_of, require_room, rows_of, state_bytes
from streamline_hooks.digests import batches_digest
from streamline_hooks.stack import find_stack
from streamline_hooks.statistics import Profile, poisson_weights
from streamline_hooks.statistics.chosen_tokens import blocks_run, chosen_masks, counted_tokens
from streamline_hooks.statistics.content import sequence_contents


@checked(skip=0, replicates=0)
def profile(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    *,
    tokens: Literal["all", "last"] | Sequence[Tensor] = "all",
    skip: int = 0,
    keep: Iterable[int] = (),
    replicates: int = 100,
    stack: str | None = None,
    memory: int = 2**31,
    disk: int | None = None,
    folder: str | Path | None = None,
    check: bool = True,
    before_done: Callable[[Profile], None] = lambda made: None,
) -> Profile:
    """Compare every two places of the residual stream, as `streamline_hooks.profile` does in memory.

    A token's states at all places are compared with one another, so that those of all tokens are kept to the end:
    places · tokens · features numbers, in files where they do not fit into `memory`. With `disk` the batches are taken
    in parts whose states fit there, and the blocks are read once for each part.

    Parameters
    ----------
    model : torch.nn.Module
        From `open_checkpoint`.
    batches, tokens, skip, keep, replicates, stack
        As for `streamline_hooks.profile`.
    memory : int
        Bytes of states that may be in memory.
    disk : int, optional
        Bytes that the states of one part may take in all; by default there is one part.
    folder : str or Path, optional
        Keep everything in this folder, so that an interrupted pass goes on at its block when it is started again with
        the same arguments. What the pass wrote is taken away in the end.
    check : bool
        See `BlockwisePass`.
    before_done : callable
        Is given what is returned while the files of its parts are still there, so that it can be kept before they go.

    Returns
    -------
    Profile
        The one that the model in memory has, fingerprint included.

    Raises
    ------
    UnsupportedSurgery
        If the model cannot be run block by block.
    StreamlineError
        If an argument does not fit, a state is not finite, or there is no room for the states; the text says how much
        they take.

    Examples
    --------
    >>> import tempfile, torch
    >>> from streamline_hooks.blockwise import open_checkpoint
    >>> from streamline_hooks.testing import tiny_model
    >>> folder = tempfile.mkdtemp()
    >>> tiny_model("llama").save_pretrained(folder)
    >>> found = profile(open_checkpoint(folder), [torch.arange(3, 43).view(4, 10)])
    >>> found.places, found.tokens
    (9, 40)
    """
    batches = list(batches)
    chosen, masks = chosen_masks(tokens, len(batches))
    found = find_stack(model, stack)
    reach = blocks_run(keep, len(found))
    about = {**identity_of(found), "tokens": chosen, "skip": skip}
    room = None if folder is None else Path(folder)
    sizes = [(reach + 1) * size for size in state_bytes(found, batches)]
    parts = parts_of(sizes, disk)
    require_room(max(sum(sizes[k] for k in part) for part in parts), memory, room)
    result = Profile(reach + 1, replicates=replicates, about=about)
    written: list[Path] = []
    for number, part in enumerate(parts):
        mine = [batches[k] for k in part]
        digest = batches_digest([*mine, *(masks[k] for k in part if masks[k] is not None)])
        file = None if room is None else room / f"part_{number:04d}_{digest}.safetensors"
        if file is None or not file.is_file():
            one = Profile(reach + 1, replicates=replicates, about=about)
            with BlockwisePass(
                model, mine, stop=reach, memory=memory, folder=None if room is None else room / f"part_{number:04d}",
                check=check and number == 0, stack=stack,
                what="profile" if len(parts) == 1 else f"profile, part {number + 1} of {len(parts)}",
            ) as states:  # fmt: skip
                for _ in states:  # the states at all places stay
                    pass
                for local, k in enumerate(part):
                    real = states.masks[local]
                    counted = counted_tokens(real, chosen, skip, masks[k])
                    contents = sequence_contents(found, batches[k], real) if replicates else []
                    weights = poisson_weights(contents, replicates) if replicates else None
                    for rows in rows_of(len(real), sizes[k], memory):
                        at = [states.read(place, local)[rows] for place in range(reach + 1)]
                        drawn = None if weights is None else weights[rows]
                        one.update(at, counted[rows], real=real[rows], weights=drawn)
                if file is not None:
                    one.save(file)
                states.done()
        else:
            one = Profile.load(file)
        result.merge(one)
        written += [] if file is None else [file]
    before_done(result)
    for file in written:
        file.unlink()
    if room is not None and not any(room.iterdir()):
        room.rmdir()
    return result
