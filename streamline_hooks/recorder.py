"""Read the hidden states of a model while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from streamline_hooks.arguments import block_numbers, checked
from streamline_hooks.batch import mask_beside_cache, mask_of_call, prepare
from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import (
    naming_remedy,
    nested_mask,
    padded,
    parameter_name,
    possible_states,
    read_input,
    read_output,
    require_batch_first,
)
from streamline_hooks.layouts import by_token
from streamline_hooks.read_hook import OutermostCall, ReadHook
from streamline_hooks.stack import BlockStack, find_stack
from streamline_hooks.wrapping import refuse_compiled, refuse_replicated


class ForwardStopped(Exception):
    """Ends a forward whose remaining blocks are not needed; `HiddenStateRecorder.__call__` catches it."""


class HiddenStateRecorder:
    """Record the states that enter and leave the blocks of a model.

    ``record.inputs[k]`` and ``record.outputs[k]`` are lists with one tensor a visit of block k: a model that is
    called once has one visit, ``generate`` one for the prefill and one for each decoding step, a looped model several
    a forward. The last block's output is the block's own, before the model's final norm. At a splice, an input is
    what the block's own computation receives, after the splice.

    Parameters
    ----------
    model : torch.nn.Module
        The model, not compiled.
    blocks : iterable of int, optional
        The blocks to record, negative numbers counted from the end; all by default. Numbers are those of the model
        as it is when the recorder is made.
    inputs, outputs : bool
        What to record.
    tokens : {"all", "last", "real"} or torch.Tensor
        "all" keeps states as the block has them, usually (batch, tokens, features); "last" keeps each sequence's last
        real token, (batch, features); "real" keeps all real tokens, (tokens, features); a boolean mask of shape (batch,
        tokens) keeps those chosen. "last" and "real" read the model's own ``attention_mask``, or
        ``src_key_padding_mask``. Several streams of a state are one after the other among its features, see
        `streamline_hooks.layouts`.
    device, dtype : optional
        Where and as what to keep the states; as they are by default.
    detach : bool
        Keep copies without the graph (default), or the very tensors with their graph.
    retain_grad : bool
        With ``detach=False``, keep the gradient that reaches each state in its ``grad``.
    stop : bool
        Stop the forward as soon as the last chosen block has been recorded. The model is then run as
        ``record(**batch)``.
    stack : str, optional
        The path of the stack, see `find_stack`.

    Raises
    ------
    StreamlineError
        If the model is compiled, a block's number is out of range, or `retain_grad` is asked for something else than
        the states themselves.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    >>> with HiddenStateRecorder(encoder, blocks=[0, -1]) as record:
    ...     _ = encoder(torch.zeros(1, 4, 8))
    >>> sorted(record.outputs), record.inputs[0][0].shape
    ([0, 2], torch.Size([1, 4, 8]))
    """

    @checked()
    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[int] | None = None,
        *,
        inputs: bool = True,
        outputs: bool = True,
        tokens: Literal["all", "last", "real"] | Tensor = "all",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        retain_grad: bool = False,
        stop: bool = False,
        stack: str | None = None,
    ) -> None:
        self.stack = find_stack(model, stack)
        self.model = model
        self.blocks = _chosen(blocks, len(self.stack))
        if not (inputs or outputs):
            raise StreamlineError("A recorder was asked for neither inputs nor outputs; ask for one of them.")
        if retain_grad and (detach or not isinstance(tokens, str) or tokens != "all" or device or dtype):
            raise StreamlineError(
                "retain_grad=True keeps the gradient of the model's own states, and a copy, a choice of tokens or "
                "another device or dtype is something else. Give detach=False and leave tokens, device and dtype away."
            )
        self.inputs: dict[int, list[Tensor]] = {k: [] for k in self.blocks} if inputs else {}
        self.outputs: dict[int, list[Tensor]] = {k: [] for k in self.blocks} if outputs else {}
        self._tokens = tokens
        self._device, self._dtype = device, dtype
        self._detach, self._retain_grad = detach, retain_grad
        self._stop = stop
        self._attention_mask: Any = None
        self._call = OutermostCall()
        self._handles: list[RemovableHandle] = []
        self._latest: tuple[Tensor, int | None, Tensor] | None = None
        self._flow = StateFlow(self.stack)
        self._with_graph = False

    def __enter__(self) -> Self:
        if self._handles:
            raise StreamlineError("This recorder is open already; make a second one to record twice.")
        refuse_compiled(self.model, "record the hidden states of")
        refuse_replicated(self.model, "record the hidden states of")
        if not isinstance(self._tokens, str) or self._tokens != "all":
            require_batch_first(self.stack[0])
        try:
            self._handles += self._call.hooks(self.stack.ancestors)
            for module in self.stack.ancestors:
                read = ReadHook(module, partial(self._read_mask, module))
                self._handles.append(module.register_forward_pre_hook(read, with_kwargs=True))
            for handle in self._flow.hooks(self.blocks):
                self._handles.append(handle)
            for k in self.blocks:
                block = self.stack[k]
                if self.inputs:
                    read = ReadHook(block, partial(self._read_input, k))
                    self._handles.append(block.register_forward_pre_hook(read, with_kwargs=True))
                if self.outputs:
                    self._handles.append(block.register_forward_hook(ReadHook(block, partial(self._read_output, k))))
        except BaseException:
            self._remove_hooks()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_hooks()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a batch that `prepare` completes; with ``stop=True`` the forward gives None."""
        if not self._handles:
            raise StreamlineError("The recorder is not open; use it in a with statement.")
        try:
            return self.model(*args, **prepare(self.model, kwargs))
        except ForwardStopped:
            return None

    def clear(self) -> None:
        """Forget what has been recorded so far, for the next batch."""
        for kept in (*self.inputs.values(), *self.outputs.values()):
            kept.clear()
        self._latest = None
        self._flow.forget()

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._latest = None
        self._flow.forget()
        self._attention_mask = None

    def _read_mask(self, watched: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call.begins(watched):
            self._attention_mask = self._latest = None
        self._with_graph = torch.is_grad_enabled()  # of any of them: some losses call an inner one
        self._attention_mask = mask_beside_cache(mask_of_call(watched, args, kwargs, self._attention_mask), kwargs)

    def _read_input(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs[k].append(self._keep(read_input(args, kwargs, self.stack[k]), self.stack[k]))
        if self._stop and k == self.blocks[-1] and not self.outputs:
            raise ForwardStopped(_STOPPED)

    def _read_output(self, k: int, args: tuple[Any, ...], output: Any) -> None:
        self.outputs[k].append(self._keep(read_output(output), self.stack[k]))
        if self._stop and k == self.blocks[-1]:
            raise ForwardStopped(_STOPPED)

    def _keep(self, state: Tensor, block: nn.Module) -> Tensor:
        # A block's output is usually the next one's input: the same tensor is copied once. A compiler sees neither
        # versions nor addresses.
        compiling = torch.compiler.is_compiling()
        version = None if compiling or state.is_inference() else state._version
        if self._latest is not None and self._latest[0] is state and self._latest[1] == version is not None:
            return self._latest[2]
        if self._detach:
            kept = self._choose(state.detach(), block).to(device=self._device, dtype=self._dtype)
            if compiling or kept.data_ptr() == state.data_ptr():
                kept = kept.clone()  # a block may work on its input in place
        elif self._with_graph and not torch.is_grad_enabled():
            raise StreamlineError(
                "The graph of a state was to be kept (detach=False), but a block runs without one inside a forward "
                "that has it, as gradient checkpointing with use_reentrant=True does. Use use_reentrant=False, or "
                "detach."
            )
        else:
            # Checkpointing counts what a block keeps for its backward; this is no part of it.
            with nullcontext() if compiling else saved_tensors_hooks(_itself, _itself):
                kept = self._choose(state, block).to(device=self._device, dtype=self._dtype)
            if self._retain_grad and kept.requires_grad:
                kept.retain_grad()
        self._latest = (state, version, kept)
        return kept

    def _choose(self, state: Tensor, block: nn.Module) -> Tensor:
        if isinstance(self._tokens, Tensor) or self._tokens != "all":
            state = state if state.is_nested else by_token(state, block)
        if isinstance(self._tokens, Tensor):
            state = padded(state, self._tokens.shape[1])
            mask = self._tokens.to(state.device).bool()
            if mask.shape != state.shape[:2]:
                raise StreamlineError(
                    f"tokens is a mask of shape {tuple(mask.shape)}; the states have {tuple(state.shape[:2])} "
                    "(batch, tokens). Give one entry a token."
                )
            return state[mask]
        given = self._attention_mask
        if state.is_nested:
            width = given.shape[1] if isinstance(given, Tensor) else None
            given, state = nested_mask(state, width), padded(state, width)
        if self._tokens == "all":
            return state
        if given is not None and not (isinstance(given, Tensor) and given.ndim == 2):
            raise StreamlineError(
                f"tokens={self._tokens!r} needs an attention mask of shape (batch, tokens); the model was called with "
                f"{tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__}. Record all tokens, or "
                "give a mask of those to keep."
            )
        if given is None:
            mask = torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
        else:  # while decoding, the mask covers the past as well
            mask = given[:, -state.shape[1] :].to(state.device).bool()
            if mask.shape != state.shape[:2]:
                raise StreamlineError(
                    f"tokens={self._tokens!r} needs a mask for states of {tuple(state.shape[:2])} (batch, tokens); "
                    f"that of the model's call is {tuple(given.shape)}, of something else. Record all tokens, or give "
                    "a mask of those to keep."
                )
        if self._tokens == "real":
            return state[mask]
        places = torch.arange(state.shape[1], device=state.device)
        last = torch.where(mask, places, -1).amax(dim=1)
        if (last < 0).any():
            raise StreamlineError("A sequence without a real token has no last one; leave it out of the batch.")
        return state[torch.arange(len(state), device=state.device), last]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


_STOPPED = "The recorder was told to stop here. Run the model as record(**batch), which expects this."


def _chosen(blocks: Iterable[int] | None, length: int) -> tuple[int, ...]:
    if blocks is None:
        return tuple(range(length))
    chosen = sorted(set(block_numbers(blocks, length, "blocks")))
    if not chosen:
        raise StreamlineError("blocks=[] is empty. Expected at least one block to record. Leave it out to record all.")
    return tuple(chosen)


class StateFlow:
    """Verify that the argument read as a block's hidden state is the output of the block before it.

    Each block is compared until verified once, and only if several arguments may be the state.
    """

    def __init__(self, stack: BlockStack) -> None:
        self._stack = stack
        self._left: Tensor | None = None
        self._verified: set[int] = set()

    def hooks(self, blocks: Iterable[int]) -> Iterator[RemovableHandle]:
        """Register, one by one, the hooks that verify these blocks; for block 0, whose input no block made, block 1."""
        for k in sorted({max(k, 1) for k in blocks} & set(range(len(self._stack)))):
            before, block = self._stack[k - 1], self._stack[k]
            yield before.register_forward_hook(ReadHook(before, self._leave))
            enter = ReadHook(block, partial(self._enter, k))
            yield block.register_forward_pre_hook(enter, with_kwargs=True)

    def forget(self) -> None:
        """Let go of the tensor that is kept for the next block."""
        self._left = None

    def _leave(self, args: tuple[Any, ...], output: Any) -> None:
        if len(self._verified) < len(self._stack) and not torch.compiler.is_compiling():
            self._left = read_output(output)

    def _enter(self, k: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        left, self._left = self._left, None
        block = self._stack[k]
        if left is None or k in self._verified or "spliced_before" in block._modules:  # the state was changed there
            return
        state = read_input(args, kwargs, block)
        others = [(place, value) for place, value in possible_states(args, kwargs, left) if value is not state]
        if others and not _equal(state, left):
            for place, value in others:
                if _equal(value, left):
                    name = parameter_name(block, place) or place
                    raise StreamlineError(
                        f"Block {k} ({type(block).__name__}) of {self._stack.path} receives the output of block "
                        f"{k - 1} as {name!r}, which is not the argument that was read as its hidden state. "
                        f"{naming_remedy(block, name)}"
                    )
        self._verified.add(k)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if one.shape != other.shape or one.is_nested or other.is_nested:
        return False
    return torch.equal(one.detach().to(other), other.detach())
