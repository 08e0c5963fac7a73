"""Whether a model is right without blocks that are skipped at random, asked once before the training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch.utils.hooks import RemovableHandle

from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.in_training.skipping import Skipping
from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.bypass import bypass
from streamline_hooks.surgery.hazards import find_hazards
from streamline_hooks.surgery.probe import observe_hooked, shortfall
from streamline_hooks.surgery.saving import saver_depth


def require_skippable(skipping: Skipping, blocks: Sequence[int]) -> None:
    """Raise unless a model is right without some of its blocks.

    Each second of them is left out at once, and then the others, and the model held against itself with the same
    blocks bypassed. Where that is not right, one is tried after the other, to name the one that cannot go.

    Parameters
    ----------
    skipping : Skipping
    blocks : sequence of int
        Those that may be skipped.

    Raises
    ------
    UnsupportedSurgery
        With the hazards of the first block that cannot go, and what to do.
    StreamlineError
        If there is no other block.
    """
    stack = skipping.stack
    if len(stack) < 2 and blocks:
        raise StreamlineError(f"{stack.path} has one block, which cannot be skipped; expected two at least.")
    for k in blocks:
        hazards = find_hazards(stack, range(k, k + 1))
        if hazards:
            _refuse(k, f"{'; '.join(map(str, hazards))}.", hazards[0].cause)
    for some in (blocks[::2], blocks[1::2]):
        wrong = _wrong_without(skipping, some) if some else None
        if wrong is not None:
            for k in some:
                _try_alone(stack, k)
            raise UnsupportedSurgery(
                f"Blocks {', '.join(map(str, some))} cannot be skipped in one forward: without them {wrong}, though "
                "each of them can go alone. Name some of them in keep=.",
                "probe",
            )


def _wrong_without(skipping: Skipping, blocks: Sequence[int]) -> str | None:
    """What the model does otherwise than with these blocks bypassed; None where it is right, or nothing can tell."""
    stack, model = skipping.stack, skipping.model
    called: set[int] = set()

    def attach() -> list[RemovableHandle]:
        called.clear()
        watching = [stack[k].register_forward_pre_hook(partial(_note, called, k)) for k in blocks]
        return [*watching, *(handle for k in blocks for handle in bypass(stack[k], stack[k]))]

    what = f"Skipping blocks of this {type(model).__name__} is not held against the same blocks bypassed"
    holds = saver_depth(stack) == 0
    truth = observe_hooked(model, attach, what, frames=5, runs=stack[blocks[0]]) if holds else None
    if truth is not None and len(called) < len(blocks):
        given = " and ".join(truth.given)
        return f"nothing shows whether the model is right, as a forward of {given} alone does not run them all"
    own = {id(parameter) for parameter in model.parameters()}
    skipping.leave_out(blocks)
    try:
        copies = [name for name, parameter in model.named_parameters() if id(parameter) not in own]
        if copies:
            raise UnsupportedSurgery(
                f"Blocks of {type(model).__name__} cannot be skipped at random: {' and '.join(copies)} would be copies "
                "without the parts of those blocks, and what the copies learn would be lost. Train this model with "
                "all its blocks.",
                "per-layer-embeddings",
            )
        return None if truth is None else shortfall(truth, model)
    finally:
        skipping.put_back()


def _note(called: set[int], k: int, *given: object) -> None:
    called.add(k)


def _try_alone(stack: BlockStack, k: int) -> None:
    with LayerSurgeon(stack.model, stack) as surgeon:
        try:
            surgeon.remove([k])
        except UnsupportedSurgery as error:
            _refuse(k, str(error).split(" cannot go: ", 1)[-1].removesuffix(" Choose others."), error.cause)


def _refuse(k: int, why: str, cause: str) -> None:
    raise UnsupportedSurgery(
        f"Block {k} cannot be skipped: {why} Name it in keep=, so that it is never skipped.", cause
    )
