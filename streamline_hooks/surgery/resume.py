"""Run a model from one of its blocks to its output."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    StreamlineError,
    UnsupportedSurgery,
    is_sharded,
    prepare_inputs,
    takes_use_cache,
    validate_arguments,
)
from streamline_hooks.modeling import (
    BlockStack,
    ProbeFailedError,
    choose_probe_inputs,
    find_stack,
    isolated_inference,
    logits_of_output,
    nested_like,
    padded,
    probe_logits,
    read_input,
    read_output,
    saves_itself,
    write_input,
    write_output,
)
from streamline_hooks.surgery.hazards import find_hazards, position_bias_owners
from streamline_hooks.surgery.probe import probe_logits_allclose
from streamline_hooks.surgery.splice import BEFORE, set_splices, spliced
from streamline_hooks.surgery.surgeon import LayerSurgeon


@validate_arguments()
def resume(
    model: nn.Module,
    k: int,
    states: Tensor,
    batch: Batch | Tensor,
    *,
    stack: str | None = None,
    before_splices: bool = False,
) -> Any:
    """Run a model from block k to its output, starting from given hidden states.

    No block before k is run, except the one that computes the relative position bias for all blocks (T5); its output is
    discarded. Masks and positions are those of a forward pass on `batch`.

    Parameters
    ----------
    model : torch.nn.Module
        Model that contains the stack of blocks.
    k : int
        Index of the block that receives the states. The number of blocks runs only the layers after the stack.
    states : torch.Tensor
        Input of block k, of shape (batch, tokens, features).
    batch : mapping or torch.Tensor
        Input of the model's forward. Its tokens determine masks and positions only.
    stack : str, optional
        Path of the stack; see `find_stack`.
    before_splices : bool
        Whether to run the modules spliced in before block k on the states. By default the states are passed to the
        block itself, after these modules.

    Returns
    -------
    Any
        Output of the model's forward.

    Raises
    ------
    StreamlineError
        If k is out of range, the states are not floating-point, or their shape does not fit the batch.
    UnsupportedSurgery
        If the blocks from k on depend on earlier blocks.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks import HiddenStateRecorder
    >>> from streamline_hooks.testing import tiny_model
    >>> model, tokens = tiny_model("llama"), torch.arange(6)[None]
    >>> with torch.no_grad(), HiddenStateRecorder(model, blocks=[2]) as record:
    ...     whole = model(tokens).logits
    ...     torch.equal(resume(model, 2, record.inputs[2][0], tokens).logits, whole)
    True
    """
    length = len(find_stack(model, stack))
    if not 0 <= k <= length:
        raise StreamlineError(
            f"Cannot resume at block {k}: the stack has {length} blocks. Expected k from 0 to {length}. Change k."
        )
    if not states.is_floating_point():
        raise StreamlineError(
            f"states has dtype {states.dtype}. Expected floating-point hidden states. Pass the input of a block."
        )
    _verify(model, find_stack(model, stack), k, before_splices)
    return _run_from(model, k, states, prepare_inputs(model, batch), stack, before_splices)


_verified: WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = WeakKeyDictionary()
"""By container of blocks, what `_verify` has compared: model, blocks, position."""


def _verify(model: nn.Module, stack: BlockStack, k: int, before_splices: bool) -> None:
    """Raise unless a model that is resumed from its own state gives its own logits.

    They are compared once for each block, on a few tokens. Nothing is compared if the model is not one of Transformers
    or cannot be run without a batch, or if ranks would have to run it together.
    """
    key = (id(model), k, before_splices, *map(id, stack.blocks))
    known = _verified.setdefault(stack.container, set())
    if not k or key in known or not saves_itself(model) or is_sharded(model):
        return
    states: list[Tensor] = []
    block = stack[min(k, len(stack) - 1)]

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(read_input(args, kwargs, block).clone())  # a module may change its input in place

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(read_output(output).clone())

    with isolated_inference(model):
        try:
            inputs = choose_probe_inputs(model, block)
            handle = (
                block.register_forward_pre_hook(enter, with_kwargs=True, prepend=before_splices)
                if k < len(stack)
                else block.register_forward_hook(leave, prepend=before_splices)
            )
            try:
                logits = probe_logits(model, inputs)
            finally:
                handle.remove()
        except ProbeFailedError:
            return
        if not states:
            return
        takes_cache = takes_use_cache(inspect.signature(model.forward).parameters)
        without_cache = {**inputs, "use_cache": False} if takes_cache else inputs
        resumed = logits_of_output(_run_from(model, k, states[-1], without_cache, stack.path, before_splices))
    if not probe_logits_allclose(resumed, logits):
        raise UnsupportedSurgery(
            f"{type(model).__name__} cannot be resumed at block {k}: from its own state it gives other logits, because "
            "blocks depend on their index or on more than the state. Run the whole model.",
            "probe",
        )
    known.add(key)


def _run_from(
    model: nn.Module, k: int, states: Tensor, inputs: Mapping[str, Any], path: str | None, before_splices: bool
) -> Any:
    length = len(find_stack(model, path))
    with LayerSurgeon(model, path, probe=False) as surgeon:  # no probe: the caller's states replace the removed blocks
        first = min(k, length - 1)  # for k = length, the last block carries the hook and its output is replaced
        opened_stack = surgeon.stack
        causes = {
            n: {hazard.cause for hazard in find_hazards(opened_stack, range(n, n + 1))}
            for n in position_bias_owners(opened_stack)
        }
        needed, block = {n for n, names in causes.items() if names == {"position-bias"}}, opened_stack[first]
        splices = spliced(block, BEFORE)
        if before := [n for n in range(first) if n not in needed]:
            surgeon.remove(before)
        # The surgeon moved the splices of removed blocks to this block, and restores them on exit.
        if before_splices and spliced(block, BEFORE) != splices:
            set_splices(block, BEFORE, splices)

        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return write_input(args, kwargs, _match_shape(states, read_input(args, kwargs, block)), block)

        def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return write_output(output, _match_shape(states, read_output(output)))

        handle = (
            block.register_forward_pre_hook(enter, with_kwargs=True, prepend=before_splices)
            if k < length
            else block.register_forward_hook(leave, prepend=before_splices)
        )
        try:
            return model(**inputs)
        finally:
            handle.remove()


def _match_shape(states: Tensor, expected: Tensor) -> Tensor:
    nested, expected = expected, padded(expected, states.shape[1] if expected.is_nested else None)
    if states.shape != expected.shape:
        raise StreamlineError(
            f"states has shape {tuple(states.shape)}, but this batch has {tuple(expected.shape)} (batch, tokens, "
            "features). Pass the states of the same batch."
        )
    return nested_like(states.to(device=expected.device, dtype=expected.dtype), nested)
