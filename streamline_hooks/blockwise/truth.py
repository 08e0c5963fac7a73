"""Whether a model can be run block by block: what is known from looking at it, and what a whole forward gives.

A block may need more of those before it than the state: keys, routing, a side state, another visit. A forward of the
whole model on a few tokens, whose weights accelerate reads layer by layer, is what each block is held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from streamline_hooks.batch import Batch, real_tokens
from streamline_hooks.branches import tolerance
from streamline_hooks.errors import UnsupportedSurgery
from streamline_hooks.layouts import require_usual
from streamline_hooks.passes import inference
from streamline_hooks.recorder import ForwardStopped, HiddenStateRecorder
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.hazards import find_hazards
from streamline_hooks.surgery.per_layer_weights import width_of_slices
from streamline_hooks.surgery.splice import AFTER, BEFORE, spliced

_SEQUENCES, _TOKENS = 2, 16


def refuse_known(stack: BlockStack, stop: int) -> None:
    """Raise if blocks are known to need more than the state of those before them.

    Parameters
    ----------
    stack : BlockStack
    stop : int
        The first block that is not run.

    Raises
    ------
    UnsupportedSurgery
        With the reason.
    """
    what = f"{type(stack.model).__name__} cannot be run block by block"
    if any(spliced(block, place) for block in stack.blocks for place in (BEFORE, AFTER)):
        raise UnsupportedSurgery(f"{what}: an earlier surgery put modules between its blocks. Load it into memory.")
    require_usual(stack.blocks, what, "Load it into memory.")
    if getattr(getattr(stack.model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedSurgery(
            f"{what}: it is an encoder and a decoder, whose blocks need what the encoder made. Load it into memory."
        )
    if width_of_slices(stack):
        raise UnsupportedSurgery(
            f"{what}: each block has an input of its own beside the state (per-layer embeddings). Load it into memory."
        )
    for k in range(1, stop):
        hazards = find_hazards(stack, range(k))
        if hazards:
            raise UnsupportedSurgery(f"{what}: {hazards[0]}. Load it into memory.", hazards[0].cause)


def probe_of(batch: Batch | Tensor) -> dict[str, Any]:
    """Two sequences of a batch and 16 of their tokens, at the end where the padding is on the left."""
    given: dict[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    mask = real_tokens(given)
    shape = next(value for value in given.values() if isinstance(value, Tensor)).shape[:2]
    left = isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:_SEQUENCES, 0].all())
    tokens = slice(-_TOKENS, None) if left else slice(0, _TOKENS)
    return {
        name: value[:_SEQUENCES, tokens] if isinstance(value, Tensor) and value.shape[:2] == shape else value
        for name, value in given.items()
    }


def true_states(stack: BlockStack, probe: dict[str, Any]) -> list[Tensor]:
    """What a forward of the whole model has at each place; its LM head is not run.

    Returns
    -------
    list of torch.Tensor
        L + 1 states of shape (batch, tokens, features), on the CPU.

    Raises
    ------
    UnsupportedSurgery
        If a block is not called exactly once.
    """
    model: Any = stack.model
    record = HiddenStateRecorder(model, stack=stack.path, device="cpu")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    stopped = head.register_forward_pre_hook(_stop) if isinstance(head, nn.Module) else None
    try:
        with inference(model), record:
            record(**probe)
    finally:
        if stopped is not None:
            stopped.remove()
    for k, visits in record.outputs.items():
        if len(visits) != 1:
            raise UnsupportedSurgery(
                f"{type(model).__name__} cannot be run block by block: a forward called block {k} {len(visits)} times; "
                "expected once. Load it into memory.",
                "looped-blocks",
            )
    return [*(record.inputs[k][0] for k in record.blocks), record.outputs[len(stack) - 1][0]]


def require_true(stack: BlockStack, place: int, made: Tensor, truth: Sequence[Tensor], real: Tensor) -> None:
    """Raise unless a state that was made block by block is what the whole model has there, where tokens are real.

    Raises
    ------
    UnsupportedSurgery
    """
    made, wanted = made.cpu()[real], truth[place][real]
    largest, off = float(wanted.abs().max()), float((made - wanted).abs().max())
    if not off <= tolerance(wanted.dtype) * largest:
        where = f"block {place - 1} leaves another state" if place else "another state enters block 0"
        raise UnsupportedSurgery(
            f"{type(stack.model).__name__} cannot be run block by block: {where} than in the whole model, by {off:.2g} "
            f"where the largest value is {largest:.2g}. It needs more of the blocks before it than the state, or the "
            "model changes the state between two blocks. Load it into memory.",
            "probe",
        )


def _stop(*_: Any) -> None:
    raise ForwardStopped("The states of all blocks are there.")
