"""Tell whether a checkpoint's model keeps the documents of a packed row apart, each block read once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from streamline_hooks.batch import Batch
from streamline_hooks.blockwise.passing import BlockwisePass
from streamline_hooks.calibration.boundaries import cannot_be_run, most_divided, piece_of, require_apart
from streamline_hooks.errors import StreamlineError


def refuse_crossing(model: nn.Module, batches: Sequence[Batch], *, stack: str | None = None) -> None:
    """Raise unless a model gives each document of packed rows the states that it has alone.

    What `streamline_hooks.calibration.refuse_crossing` does in memory: two rows with the most pieces go through block
    k, and each of their pieces alone, before block k + 1 is read.

    Parameters
    ----------
    model : torch.nn.Module
        From `open_checkpoint`, or any other.
    batches : sequence of mapping
        Packed rows, see `packed_batches`.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Raises
    ------
    UnsupportedSurgery
        If the model cannot be run block by block.
    StreamlineError
        Naming the model, the first block whose state differs, and by how much.

    Examples
    --------
    >>> from streamline_hooks.calibration import packed_batches
    >>> from streamline_hooks.testing import tiny_model
    >>> refuse_crossing(tiny_model("llama"), packed_batches([[[5, 6, 7], [8, 9]]], batch_size=1))
    """
    divided = most_divided(model, batches)
    if divided is None:
        return
    rows, pieces = divided
    alone = [piece_of(rows, *piece) for piece in pieces]
    try:
        with BlockwisePass(model, [rows, *alone], check=False, stack=stack, what="packed rows") as states:
            for place in states:
                states.drop(place - 1)
                whole = states.read(place, 0)
                if not place:  # what enters block 0 differs where what leaves it does
                    continue
                for number, (row, start, stop) in enumerate(pieces, start=1):
                    require_apart(model, place - 1, whole[row, start:stop], states.read(place, number)[0], start)
    except StreamlineError:
        raise
    except Exception as error:  # whatever a model makes of positions that it does not expect
        raise cannot_be_run(model, error) from error
