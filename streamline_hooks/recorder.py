"""Read the hidden states of a model while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.batch import prepare
from streamline_hooks.errors import StreamlineError
from streamline_hooks.hidden_state import read_input, read_output
from streamline_hooks.stack import find_stack
from streamline_hooks.wrapping import refuse_compiled


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
        "all" keeps (batch, tokens, features); "last" keeps each sequence's last real token, (batch, features);
        "real" keeps all real tokens, (tokens, features); a boolean mask of shape (batch, tokens) keeps those
        chosen. "last" and "real" read the model's own ``attention_mask``.
    device, dtype : optional
        Where and as what to keep the states; as they are by default.
    detach : bool
        Keep copies without the graph (default), or the very tensors with their graph.
    stop : bool
        Stop the forward as soon as the last chosen block has been recorded. The model is then run as
        ``record(**batch)``.
    stack : str, optional
        The path of the stack, see `find_stack`.

    Raises
    ------
    StreamlineError
        If the model is compiled, or a block's number is out of range.

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
        stop: bool = False,
        stack: str | None = None,
    ) -> None:
        self.stack = find_stack(model, stack)
        self.model = model
        self.blocks = _chosen(blocks, len(self.stack))
        if not (inputs or outputs):
            raise StreamlineError("A recorder was asked for neither inputs nor outputs; ask for one of them.")
        if not isinstance(tokens, Tensor) and tokens not in ("all", "last", "real"):
            raise StreamlineError(f"tokens={tokens!r} is unknown; expected 'all', 'last', 'real' or a boolean mask.")
        self.inputs: dict[int, list[Tensor]] = {k: [] for k in self.blocks} if inputs else {}
        self.outputs: dict[int, list[Tensor]] = {k: [] for k in self.blocks} if outputs else {}
        self._tokens = tokens
        self._device, self._dtype = device, dtype
        self._detach = detach
        self._stop = stop
        self._attention_mask: Any = None
        self._handles: list[RemovableHandle] = []
        self._latest: tuple[Tensor, int | None, Tensor] | None = None

    def __enter__(self) -> Self:
        if self._handles:
            raise StreamlineError("This recorder is open already; make a second one to record twice.")
        refuse_compiled(self.model, "record the hidden states of")
        try:
            for module in self.stack.ancestors:
                hook = self._mask_hook(module)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            for k in self.blocks:
                block = self.stack[k]
                if self.inputs:
                    hook = self._input_hook(k, block)
                    self._handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
                if self.outputs:
                    self._handles.append(block.register_forward_hook(self._output_hook(k, block)))
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

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._latest = None
        self._attention_mask = None

    # The hooks are closures that know their own module: a deep copy of the model carries them along, and must not
    # write into this recorder.

    def _mask_hook(self, watched: nn.Module) -> Callable[..., None]:
        signature = inspect.signature(watched.forward)
        takes_mask = "attention_mask" in signature.parameters

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not watched:
                return
            if module is self.model:
                self._attention_mask = None
                self._latest = None
            if takes_mask:
                # The innermost model's own: an encoder's mask says nothing of its decoder's tokens.
                self._attention_mask = signature.bind_partial(*args, **kwargs).arguments.get("attention_mask")

        return hook

    def _input_hook(self, k: int, block: nn.Module) -> Callable[..., None]:
        stop_here = self._stop and k == self.blocks[-1] and not self.outputs

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is block:
                self.inputs[k].append(self._keep(read_input(args, kwargs)))
                if stop_here:
                    raise ForwardStopped(_STOPPED)

        return hook

    def _output_hook(self, k: int, block: nn.Module) -> Callable[..., None]:
        stop_here = self._stop and k == self.blocks[-1]

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module is block:
                self.outputs[k].append(self._keep(read_output(output)))
                if stop_here:
                    raise ForwardStopped(_STOPPED)

        return hook

    def _keep(self, state: Tensor) -> Tensor:
        # A block's output is usually the next one's input: the same tensor is copied once.
        version = None if state.is_inference() else state._version
        if self._latest is not None and self._latest[0] is state and self._latest[1] == version is not None:
            return self._latest[2]
        kept = self._choose(state.detach() if self._detach else state)
        kept = kept.to(device=self._device, dtype=self._dtype)
        if self._detach and kept.data_ptr() == state.data_ptr():
            kept = kept.clone()  # a block may work on its input in place
        self._latest = (state, version, kept)
        return kept

    def _choose(self, state: Tensor) -> Tensor:
        if isinstance(self._tokens, Tensor):
            mask = self._tokens.to(state.device).bool()
            if mask.shape != state.shape[:2]:
                raise StreamlineError(
                    f"tokens is a mask of shape {tuple(mask.shape)}; the states have {tuple(state.shape[:2])} "
                    "(batch, tokens). Give one entry a token."
                )
            return state[mask]
        if self._tokens == "all":
            return state
        given = self._attention_mask
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
        if self._tokens == "real":
            return state[mask]
        places = torch.arange(state.shape[1], device=state.device)
        last = torch.where(mask, places, -1).amax(dim=1)
        if (last < 0).any():
            raise StreamlineError("A sequence without a real token has no last one; leave it out of the batch.")
        return state[torch.arange(len(state), device=state.device), last]


_STOPPED = "The recorder was told to stop here. Run the model as record(**batch), which expects this."


def _chosen(blocks: Iterable[int] | None, length: int) -> tuple[int, ...]:
    if blocks is None:
        return tuple(range(length))
    given = list(blocks)
    wrong = [k for k in given if not -length <= k < length]
    if wrong or not given:
        what = f"Block {wrong[0]}" if wrong else "An empty list of blocks"
        raise StreamlineError(f"{what} cannot be recorded: the stack has {length} blocks, 0 to {length - 1}.")
    return tuple(sorted({k % length for k in given}))
