"""Drive batches through a model, or through the part of it that is needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch, prepare, tokens_of
from streamline_hooks.distributed import here
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.hidden_state import (
    nested_like,
    padded,
    read_input,
    read_output,
    require_batch_first,
    token_mask,
    write_input,
    write_output,
)
from streamline_hooks.layouts import by_token
from streamline_hooks.read_hook import WatchedMask
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.scoped import scoped
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.surgery import LayerSurgeon
from streamline_hooks.surgery.forward_state import evaluation_mode, preserve_forward_state
from streamline_hooks.surgery.hazards import find_hazards, position_bias_owners
from streamline_hooks.surgery.splice import BEFORE, set_splices, spliced

_HIDDEN = ContextVar("_HIDDEN", default=False)


@contextmanager
def inference(model: nn.Module, *, restore: bool = True) -> Iterator[None]:
    """Run a model in evaluation mode without gradients, and restore its mode.

    If `restore`, what the forwards change in the model is undone too, see `preserve_forward_state`.
    """
    with evaluation_mode(model), preserve_forward_state(model) if restore else nullcontext(), torch.no_grad():
        yield


@checked()
def resume(
    model: nn.Module,
    k: int,
    states: Tensor,
    batch: Batch | Tensor,
    *,
    stack: str | None = None,
    before_splices: bool = False,
) -> Any:
    """Run a model from block k on, on given states.

    No block before k is run, but one that makes the relative position bias of all (T5): it is run in vain. Masks and
    positions are those that a forward of `batch` would have made.

    Parameters
    ----------
    model : torch.nn.Module
    k : int
        The block that receives the states; the number of blocks to go straight to what follows the stack.
    states : torch.Tensor
        What block k receives, of shape (batch, tokens, features).
    batch : mapping or torch.Tensor
        What the model's forward takes; its tokens give masks and positions only.
    stack : str, optional
        Path of the stack, see `find_stack`.
    before_splices : bool
        The states are what comes to block k, and what is spliced in there still has to run on them; by default they
        are what the block's own computation receives.

    Returns
    -------
    Any
        What the model's forward returns.

    Raises
    ------
    StreamlineError
        If k is out of range or the states do not fit the batch.
    UnsupportedSurgery
        If the blocks from k on need those before.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(
    ...     LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    ... ).eval()
    >>> tokens = torch.arange(6)[None]
    >>> with torch.no_grad(), HiddenStateRecorder(model, blocks=[2]) as record:
    ...     whole = model(tokens).logits
    ...     torch.equal(resume(model, 2, record.inputs[2][0], tokens).logits, whole)
    True
    """
    length = len(find_stack(model, stack))
    if not 0 <= k <= length:
        raise StreamlineError(f"Cannot resume at block {k}: the stack has {length} blocks, so 0 to {length}.")
    if not states.is_floating_point():
        raise StreamlineError(
            f"states are {states.dtype}. Expected floating-point hidden states. Pass a block's input."
        )
    with LayerSurgeon(model, stack, probe=False) as surgeon:  # the caller has the truth: the states
        first = min(k, length - 1)  # at the end some block has to carry the hook, and is run in vain
        needed, block = _run_in_vain(surgeon.stack), surgeon.stack[first]
        own = spliced(block, BEFORE)
        if before := [n for n in range(first) if n not in needed]:
            surgeon.remove(before)
        if before_splices and spliced(block, BEFORE) != own:  # what stood before the first block that goes stays, there
            set_splices(block, BEFORE, own)  # the surgeon, who put it here, takes it back
        handle = (
            block.register_forward_pre_hook(_enter(states), with_kwargs=True, prepend=before_splices)
            if k < length
            else block.register_forward_hook(_leave(states), prepend=before_splices)
        )
        try:
            return model(**prepare(model, batch))
        finally:
            handle.remove()


def forward_arguments(model: nn.Module) -> Collection[str]:
    """What a model's forward takes, by name."""
    inside = getattr(model, "get_base_model", None)  # a PEFT model's own forward names nothing
    return inspect.signature((inside() if callable(inside) else model).forward).parameters


def head_on_last(model: nn.Module, places: int) -> dict[str, int]:
    """Return keyword arguments that limit a model's LM head to the last `places` positions; empty if it cannot."""
    return {"logits_to_keep": places} if "logits_to_keep" in forward_arguments(model) else {}


@contextmanager
def without_progress() -> Iterator[None]:
    """Show no progress bars inside."""
    token = _HIDDEN.set(True)
    try:
        yield
    finally:
        _HIDDEN.reset(token)


def progress(total: int, what: str, unit: str = "tok", done: int = 0) -> tqdm[Any]:
    """A bar for a long step, which counts tokens; ``TQDM_DISABLE=1`` silences it.

    Of several processes only the first draws it, and counts its own.
    """
    hidden = here().rank or _HIDDEN.get()
    silent = {"disable": True} if hidden else {}  # for the first it stays what the environment says
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5,
        **silent,
    )


@scoped
def recorded(
    model: nn.Module,
    batches: Iterable[Batch | Tensor],
    record: HiddenStateRecorder,
    what: str,
    bar: tqdm[Any] | None = None,
) -> Generator[tuple[HiddenStateRecorder, Tensor, Any], None, None]:
    """Run each batch under a recorder and yield the recorder, the mask of real tokens (batch, tokens), and the output.

    Use it in a with statement, see `scoped`. The recorder is not open yet and is cleared between batches; the output is
    None if it stopped the forward. `what` labels the progress bar; a `bar` that is given is not moved. Raise if a state
    is not finite.
    """
    batches = batches if isinstance(batches, (list, tuple)) else list(batches)
    total = sum(tokens_of(batch) for batch in batches)
    with inference(model), record, nullcontext() if bar is not None else progress(total, what) as own:
        for number, batch in enumerate(batches):
            record.clear()
            with WatchedMask(record.stack) as watched:
                output = record(**prepare(model, batch))
            real = watched.mask
            if real is not None:
                require_batch_first(record.stack[0])
            mask = token_mask(_one_visit(record), real)
            _require_finite(record, mask, number)
            yield record, mask, output
            if own is not None:
                own.update(tokens_of(batch))


def _run_in_vain(stack: BlockStack) -> set[int]:
    """Blocks that make what the others need, and what does not depend on the states."""
    owners = position_bias_owners(stack)
    return {k for k in owners if {hazard.cause for hazard in find_hazards(stack, range(k, k + 1))} == {"position-bias"}}


def _enter(states: Tensor) -> Callable[..., Any]:
    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return write_input(args, kwargs, _fitting(states, read_input(args, kwargs, block)), block)

    return hook


def _leave(states: Tensor) -> Callable[..., Any]:
    def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return write_output(output, _fitting(states, read_output(output)))

    return hook


def _fitting(states: Tensor, made: Tensor) -> Tensor:
    nested, made = made, padded(made, states.shape[1] if made.is_nested else None)
    if states.shape != made.shape:
        raise StreamlineError(
            f"The given states have the shape {tuple(states.shape)}; this batch has {tuple(made.shape)} "
            "(batch, tokens, features). Give the states of the same batch."
        )
    return nested_like(states.to(device=made.device, dtype=made.dtype), nested)


def _one_visit(record: HiddenStateRecorder) -> Tensor:
    """Some recorded state, once it is sure that a forward calls each block once."""
    for by_block in (record.inputs, record.outputs):
        for k, visits in by_block.items():
            if len(visits) != 1:
                raise UnsupportedSurgery(
                    f"A forward called block {k} {len(visits)} times; expected once. What one visit does is not what "
                    "giving up the block would do. Record such a model with HiddenStateRecorder, visit by visit."
                )
    k, visits = next(iter((record.inputs or record.outputs).items()))
    return by_token(visits[0], record.stack[k])


def require_finite(state: Tensor, real: Tensor, where: str, number: int) -> None:
    """Raise unless the real tokens of a state of shape (batch, tokens, features) are finite."""
    if not torch.isfinite(state.sum(dtype=torch.float64)) and not torch.isfinite(state[real.to(state.device)]).all():
        raise StreamlineError(
            f"The state that {where} holds NaN or infinite values (batch {number}). Look at the weights of the blocks "
            "up to there, or run in a wider precision (float32 or bfloat16)."
        )


def _require_finite(record: HiddenStateRecorder, mask: Tensor, number: int) -> None:
    seen: set[int] = set()  # what leaves a block and enters the next is one tensor
    places = [(k, order, kind) for order, kind in enumerate(("enters", "leaves")) for k in record.blocks]
    for k, order, kind in sorted(places):
        for state in (record.inputs, record.outputs)[order].get(k, ()):
            if id(state) not in seen:
                seen.add(id(state))
                require_finite(by_token(state, record.stack[k]), mask, f"{kind} block {k}", number)
