"""Record the hidden states of a model while it runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, cast, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from streamline_hooks.core import (
    Batch,
    StreamlineError,
    UnsupportedSurgery,
    block_indices,
    cached_tokens,
    count_tokens,
    forget_compiled_graphs,
    mask_of_tokens,
    padding_mask_of_call,
    padding_mask_with_cache,
    prepare_inputs,
    progress_bar,
    refuse_compiled,
    refuse_replicated,
    validate_arguments,
    validate_fields,
)
from streamline_hooks.modeling import (
    GraphCallback,
    OutermostCall,
    ReadHook,
    WatchedMask,
    all_finite,
    by_token,
    closing_generator,
    find_stack,
    in_backward,
    inference,
    nested_mask,
    padded,
    read_input,
    read_output,
    require_batch_first,
    require_finite,
    require_whole_state,
    token_mask,
)
from streamline_hooks.recording.resolve_sites import resolve_sites
from streamline_hooks.recording.sites import (
    BLOCK_SITES,
    MODEL_SITES,
    BlockSite,
    ContributionCheck,
    ModelSite,
    Site,
    SiteAccess,
    checked_sites,
)
from streamline_hooks.recording.state_flow import StateFlowCheck


class ForwardStopped(Exception):
    """Raised to end a forward pass after the last recorded block; `HiddenStateRecorder.__call__` catches it."""


@dataclass(frozen=True, eq=False)
class RecordedBatch:
    """A batch that `HiddenStateRecorder.over` has run; its states are valid until the next batch.

    Attributes
    ----------
    record : HiddenStateRecorder
    real : torch.Tensor
        Boolean mask of shape (batch, tokens), False for padding.
    output : Any
        Return value of the model's forward, or None if the recorder stopped it.
    """

    record: HiddenStateRecorder
    real: Tensor
    output: Any

    def entering(self, k: int) -> Tensor:
        """Return the state that enters block k, (batch, tokens, features); streams are concatenated along features.

        Raises StreamlineError if it is not recorded.
        """
        return self._state("block.input", k)

    def leaving(self, k: int) -> Tensor:
        """Return the state that leaves block k, in the layout of `entering`."""
        return self._state("block.output", k)

    def _state(self, site: BlockSite, k: int) -> Tensor:
        states = self.record[site]
        if k not in states:
            raise StreamlineError(
                f"The state of block {k} at {site} is not recorded. Expected one of the blocks {sorted(states)}. Pass "
                "the block in blocks=[...]."
            )
        return by_token(states[k][0], self.record.stack[k])


@dataclass(frozen=True)
class RecordingConfig:
    """Device, dtype and graph of the tensors that a `HiddenStateRecorder` stores.

    Attributes
    ----------
    device, dtype : optional
        Device and dtype of the stored tensors. Default: unchanged.
    detach : bool
        Store detached copies (default). If False, store the tensors themselves with their graph; a compiled model is
        then compiled again in each call.
    retain_grad : bool
        With ``detach=False``, store the gradient of each tensor in its attribute ``grad``.

    Raises
    ------
    StreamlineError
        If a value has the wrong type, or `retain_grad` is combined with `detach`, `device` or `dtype`.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> config = RecordingConfig(dtype=torch.bfloat16)
    >>> model = tiny_model("llama")
    >>> with torch.no_grad(), HiddenStateRecorder(model, [1], config=config) as record:
    ...     _ = model(torch.tensor([[3, 4, 5]]))
    >>> record.outputs[1][0].dtype
    torch.bfloat16
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    detach: bool = True
    retain_grad: bool = False

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.retain_grad and (self.detach or self.device or self.dtype):
            raise StreamlineError(_RETAIN_GRAD)


_RETAIN_GRAD = (
    "retain_grad=True stores the gradients of the model's own tensors, not of copies. Expected detach=False and the "
    "defaults of tokens, device and dtype. Change these arguments, or pass retain_grad=False."
)
_DEFAULT = RecordingConfig()
_EACH_BLOCK: tuple[Site, ...] = ("block.input", "block.output")


class HiddenStateRecorder:
    """Record the hidden states of a model at standard sites, by default where they enter and leave the blocks.

    ``record[site][k]`` is a list with one tensor per call of block k; ``record.inputs`` and ``record.outputs`` are
    ``record["block.input"]`` and ``record["block.output"]``. A forward pass calls a block once, ``generate`` calls it
    once for the prefill and once per decoding step, and a looped model calls it several times per forward pass. For
    the sites of the model (``embeddings``, ``final_norm``, ``logits``) ``record[site]`` is such a list. `over` runs
    many batches.

    ============================ =====================================================================================
    site                         recorded tensor
    ============================ =====================================================================================
    ``block.input``              state that enters the block, after modules spliced in before it
    ``block.output``             state that leaves the block; for the last block before the model's final norm
    ``attention.input``          input of the attention, after the norm before it
    ``attention.heads``          input of its output projection, (batch, tokens, heads, head size)
    ``attention.output``         what the attention adds to the residual stream, after multipliers and norms
    ``mlp.input``                input of the MLP or of the mixture of experts, after the norm before it
    ``mlp.output``               what the MLP adds to the residual stream
    ``embeddings``               output of the token embeddings
    ``final_norm``               output of the norm after the last block
    ``logits``                   logits that the model returns
    ============================ =====================================================================================

    The attention of a block is the branch that mixes tokens, for instance also a Mamba layer. The sites inside a block
    are found by running it on a few tokens when the recorder is first opened on it. In the first recorded call of a
    block its input and the two contributions must sum to its output to 1e-5. A site that cannot be read is refused.

    A block with a norm after each sum, such as that of BERT, computes m = N(x + A(x)) and z = P(m + M(m)). Its
    contributions contain the norms: they are the changes m - x and z - m of the state. A call that runs a part of the
    block that did not run when the sites were found, such as the cross-attention of a decoder, is refused.

    A model may be compiled with ``torch.compile`` while the recorder is open: graphs then contain an operator for each
    state, without graph breaks and further compilations. The model is compiled anew for each recorder, and so is
    all else that was compiled in the process before.

    Parameters
    ----------
    model : torch.nn.Module
        The model, not yet compiled.
    blocks : iterable of int, optional
        Indices of the blocks to record, in the current model; negative indices count from the end. Default: all.
    sites : iterable of str, optional
        Names of the table. Default: ``block.input`` and ``block.output``.
    tokens : {"all", "last", "real"} or torch.Tensor
        Tokens to record. "all" keeps the states in the layout of the block, usually (batch, tokens, features). "last"
        keeps the last real token of each sequence, (batch, features). "real" keeps all real tokens, (tokens, features).
        A boolean mask of shape (batch, tokens) keeps the tokens where it is True. "last" and "real" read the
        ``attention_mask`` or ``src_key_padding_mask`` of the model's call. The streams of a state with several streams
        are concatenated along the features, see `streamline_hooks.modeling.state_layout`.
    stop : bool
        Stop the forward pass after the last recorded block. Run the model as ``record(**batch)`` in this case; a graph
        that is compiled cannot be stopped.
    stack : str, optional
        Path of the block stack, see `find_stack`.
    config : RecordingConfig, optional
        Device, dtype and graph of the recorded tensors.
    probe : mapping or torch.Tensor, optional
        A batch without padding on which the sites inside a block are found, if the library cannot create one.

    Raises
    ------
    StreamlineError
        If the model is compiled, a site is unknown, or a block index is out of range. When the recorder is closed: if
        compiled code of the model ran but nothing was recorded.
    UnsupportedSurgery
        When the recorder is opened: if a site cannot be read, or blocks pass the hidden state in two parts, as most
        models of vLLM itself do (``model_impl="transformers"`` of vLLM is recorded). In the first call of a
        block: if its input and the two contributions do not sum to its output.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    >>> with HiddenStateRecorder(encoder, blocks=[0, -1]) as record:
    ...     _ = encoder(torch.zeros(1, 4, 8))
    >>> sorted(record.outputs), record.inputs[0][0].shape
    ([0, 2], torch.Size([1, 4, 8]))

    What the attention of block 1 adds to the state, by head:

    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> with torch.no_grad(), HiddenStateRecorder(model, [1], sites=["attention.heads", "attention.output"]) as record:
    ...     _ = model(torch.tensor([[3, 4, 5]]))
    >>> record["attention.heads"][1][0].shape, record["attention.output"][1][0].shape
    (torch.Size([1, 3, 4, 8]), torch.Size([1, 3, 32]))
    """

    @validate_arguments()
    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[int] | None = None,
        *,
        sites: Iterable[str] = _EACH_BLOCK,
        tokens: Literal["all", "last", "real"] | Tensor = "all",
        stop: bool = False,
        stack: str | None = None,
        config: RecordingConfig = _DEFAULT,
        probe: Batch | Tensor | None = None,
    ) -> None:
        self.stack = find_stack(model, stack)
        self.model = model
        length = len(self.stack)
        self.blocks = tuple(range(length) if blocks is None else sorted({*block_indices(blocks, length, "blocks")}))
        if not self.blocks:
            raise StreamlineError("blocks=[] is empty. Expected at least one block. Omit blocks to record all.")
        self.sites = checked_sites(sites)
        if config.retain_grad and not (isinstance(tokens, str) and tokens == "all"):
            raise StreamlineError(_RETAIN_GRAD)
        if stop and {"final_norm", "logits"} & set(self.sites):
            raise StreamlineError(
                "stop=True ends the forward pass before the final norm and the logits. Expected sites of blocks, or "
                "embeddings. Omit stop."
            )
        self._by_block: dict[str, dict[int, list[Tensor]]] = {
            site: {k: [] for k in self.blocks} for site in self.sites if site in BLOCK_SITES
        }
        self._by_model: dict[str, list[Tensor]] = {site: [] for site in self.sites if site in MODEL_SITES}
        self._targets: list[tuple[list[Tensor], Callable[[Tensor], Tensor]]] = []
        self._callback = GraphCallback(self._receive)
        self.inputs = self._by_block.get("block.input", {})
        self.outputs = self._by_block.get("block.output", {})
        self._inner = any(site not in _EACH_BLOCK for site in self._by_block)
        self._tokens = tokens
        self._config, self._probe = config, probe
        self._stop = stop
        self._attention_mask: Any = None
        self._cached: int | None = 0
        self._has_last_tokens = False
        self._call = OutermostCall()
        self._handles: list[RemovableHandle] = []
        self._latest: tuple[Tensor, int | None, Tensor] | None = None
        self._flow = StateFlowCheck(self.stack)
        self._with_graph = False
        self._ran_compiled = self._has_recorded = False

    def __enter__(self) -> Self:
        if self._handles:
            raise StreamlineError("This recorder is already open. Create a second recorder to record twice.")
        refuse_compiled(self.model, "record the hidden states of")
        refuse_replicated(self.model, "record the hidden states of")
        if find_stack(self.model, self.stack.path).blocks != self.stack.blocks:
            raise StreamlineError(
                f"The blocks of {self.stack.path} were changed after this recorder was created. Expected the blocks of "
                "then, whose numbers the recorder has. Create it inside the surgery."
            )
        require_whole_state(self.stack[0])
        if not isinstance(self._tokens, str) or self._tokens != "all":
            require_batch_first(self.stack[0])
        accesses = self._other_sites()
        self._targets.clear()
        self._ran_compiled = self._has_recorded = False
        try:
            self._handles += self._call.hooks(self.stack.ancestors)
            self._handles.append(self.model.register_forward_hook(ReadHook(self.model, self._note_run)))
            for module in self.stack.ancestors:
                read = ReadHook(module, partial(self._read_mask, module))
                self._handles.append(module.register_forward_pre_hook(read, with_kwargs=True))
            for handle in self._flow.hooks(self.blocks):
                self._handles.append(handle)
            for k in self.blocks:
                block = self.stack[k]
                if self.inputs:
                    read = ReadHook(
                        block,
                        partial(self._read_input, k, self._target(self.inputs[k], partial(by_token, block=block))),
                    )
                    self._handles.append(block.register_forward_pre_hook(read, with_kwargs=True))
                if self.outputs:
                    read = ReadHook(
                        block,
                        partial(self._read_output, k, self._target(self.outputs[k], partial(by_token, block=block))),
                    )
                    self._handles.append(block.register_forward_hook(read))
            for access in accesses:
                for handle in access.hooks(partial(self._record, self._target_of(access))):
                    self._handles.append(handle)
            contributions = {a.k: a.branches for a in accesses if a.k is not None and a.site.endswith(".output")}
            for k, sites in contributions.items():
                for handle in ContributionCheck(k, self.stack[k], sites).hooks() if sites is not None else ():
                    self._handles.append(handle)
            if self._stop and self._inner and not self.outputs:
                last = self.stack[self.blocks[-1]]
                self._handles.append(last.register_forward_hook(ReadHook(last, self._stop_forward)))
            forget_compiled_graphs()
        except BaseException:
            self._remove_hooks()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_hooks()
        if kind is None and self._ran_compiled and not self._has_recorded:
            raise StreamlineError(
                f"{type(self.model).__name__} ran in compiled code, but nothing was recorded: it was compiled before "
                "the recorder was opened, or runs none of the recorded blocks. Expected a model that is compiled "
                "afterwards. Open the recorder before torch.compile, and call torch.compiler.reset() before opening "
                "another one."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a batch prepared by `prepare_inputs`; return its output, or None with ``stop=True``."""
        if not self._handles:
            raise StreamlineError("The recorder is not open. Use it in a with statement.")
        try:
            return self.model(*args, **prepare_inputs(self.model, kwargs))
        except ForwardStopped:
            return None

    @overload
    def __getitem__(self, site: BlockSite) -> dict[int, list[Tensor]]: ...
    @overload
    def __getitem__(self, site: ModelSite) -> list[Tensor]: ...
    def __getitem__(self, site: Site) -> dict[int, list[Tensor]] | list[Tensor]:
        """Return the tensors of a site: a list per block, or the list of a site of the model."""
        if site in self._by_model:
            return self._by_model[site]
        if site not in self._by_block:
            raise StreamlineError(
                f"site={site!r} is not recorded. Expected one of {', '.join(self.sites)}. Pass it in sites=[...]."
            )
        return self._by_block[site]

    def clear(self) -> None:
        """Delete the recorded states."""
        for states in self._lists():
            states.clear()
        self._latest = None
        self._flow.release()

    @closing_generator
    def over(self, batches: Iterable[Batch | Tensor], desc: str | None = None) -> Generator[RecordedBatch, None, None]:
        """Run batches in evaluation mode without gradients, and yield the states of each batch.

        Returns a context manager whose value is an iterator. It opens and closes the recorder and clears it before each
        batch.

        Parameters
        ----------
        batches : iterable of mapping or torch.Tensor
            Inputs of the model's forward.
        desc : str, optional
            Label of a progress bar that counts tokens. Default: no bar.

        Yields
        ------
        RecordedBatch

        Raises
        ------
        StreamlineError
            If `tokens` of the recorder is not "all", or the state of a real token is not finite.
        UnsupportedSurgery
            If a block runs more than once in a forward pass.

        Examples
        --------
        Norms of the states that enter block 3, without the left padding:

        >>> import torch
        >>> from streamline_hooks.testing import tiny_model
        >>> ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        >>> record = HiddenStateRecorder(tiny_model("llama"), [3], sites=["block.input"], stop=True)
        >>> with record.over([{"input_ids": ids, "attention_mask": mask}]) as recorded:
        ...     norms = torch.cat([batch.entering(3)[batch.real].norm(dim=-1) for batch in recorded])
        >>> len(norms), bool(norms.mean() > 0)
        (6, True)
        """
        if not isinstance(self._tokens, str) or self._tokens != "all":
            raise StreamlineError(
                "over() yields the states of all tokens and a mask of the real tokens, but this recorder selects "
                "tokens. Expected tokens='all'. Omit tokens and index the states with the mask."
            )
        batches = list(batches)
        bar = None if desc is None else progress_bar(sum(map(count_tokens, batches)), desc)
        with inference(self.model), self, bar or nullcontext():
            for number, batch in enumerate(batches):
                self.clear()
                self._call.reserve()
                with WatchedMask(self.stack) as watched:
                    output = self(**prepare_inputs(self.model, batch))
                if watched.mask is not None:
                    require_batch_first(self.stack[0])
                real = token_mask(self._one_visit(), watched.mask)
                self._require_finite(real, number)
                yield RecordedBatch(self, real, output)
                if bar is not None:
                    bar.update(count_tokens(batch))

    def _one_visit(self) -> Tensor:
        """Return a recorded (batch, tokens, features) state; raise unless the pass called each recorded block once."""
        visited = [(k, visits) for by_block in self._by_block.values() for k, visits in by_block.items()]
        for k, visits in visited:
            if len(visits) != 1:
                raise UnsupportedSurgery(
                    f"A forward pass called block {k} {len(visits)} times; expected once, because the effect of one "
                    "call is not the effect of removing the block. Use HiddenStateRecorder without over(), which "
                    "records every call."
                )
        k, (state,) = visited[0]
        return by_token(state, self.stack[k]).flatten(2)  # heads are concatenated

    def _require_finite(self, real: Tensor, number: int) -> None:
        """Raise for the first state of the forward pass that is not finite at a real token."""
        states: dict[int, tuple[str, int, Tensor]] = {}  # the output of a block is usually the input of the next
        for k in self.blocks:
            for site, by_block in self._by_block.items():
                text = {"block.input": "enters", "block.output": "leaves"}.get(site, f"is the {site} of")
                for state in by_block.get(k, ()):
                    states.setdefault(id(state), (f"{text} block {k}", k, state))
        if all_finite([state for _, _, state in states.values()]):
            return
        for text, k, state in states.values():
            require_finite(by_token(state, self.stack[k]), real, text, number)

    def _lists(self) -> Iterator[list[Tensor]]:
        for by_block in self._by_block.values():
            yield from by_block.values()
        yield from self._by_model.values()

    def _other_sites(self) -> list[SiteAccess]:
        """Find the sites that are not the input or output of a block."""
        inner = [(site, k) for site in self._by_block if site not in _EACH_BLOCK for k in self.blocks]
        wanted = [*inner, *((site, None) for site in self._by_model)]
        return resolve_sites(self.stack, cast("list[tuple[Site, int | None]]", wanted), self._probe) if wanted else []

    def _target(self, states: list[Tensor], batch_first: Callable[[Tensor], Tensor]) -> int:
        """Return the number of a list that receives states, which identifies it in a compiled graph."""
        self._targets.append((states, batch_first))
        return len(self._targets) - 1

    def _target_of(self, access: SiteAccess) -> int:
        states = self._by_model[access.site] if access.k is None else self._by_block[access.site][access.k]
        return self._target(states, access.by_token)

    def _record(self, number: int, state: Tensor) -> None:
        """Store a state; while a graph is compiled, add to it an operator that does."""
        mask = None if isinstance(self._tokens, Tensor) or self._tokens == "all" else self._attention_mask
        if torch.compiler.is_compiling() and self._config.detach and (mask is None or isinstance(mask, Tensor)):
            self._callback(number, state, *(() if mask is None else (mask,)))
        else:
            self._store(number, state)

    def _receive(self, number: int, state: Tensor, mask: Tensor | None = None) -> None:
        """Store a state of a compiled graph, with the attention mask of the model's call."""
        if self._handles and not in_backward():
            self._attention_mask = mask
            self._store(number, state)
            self._latest = self._attention_mask = None

    def _store(self, number: int, state: Tensor) -> None:
        self._has_recorded = True
        states, batch_first = self._targets[number]
        self._has_last_tokens = states is self._by_model.get("logits")
        states.append(self._convert(state, batch_first))

    def _note_run(self, *values: Any) -> None:
        if torch.compiler.is_compiling():
            self._ran_compiled = True

    def _stop_forward(self, *values: Any) -> None:
        raise ForwardStopped(_STOPPED)

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._latest = None
        self._flow.release()
        self._attention_mask = None

    def _read_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call.begins(module):
            self._attention_mask = self._latest = None
            self._cached = cached_tokens(module, args, kwargs)
        if torch.compiler.is_compiling() and not isinstance(self._tokens, Tensor) and self._tokens == "all":
            return
        self._with_graph = torch.is_grad_enabled()  # of every ancestor: some losses call an inner model
        self._attention_mask = padding_mask_with_cache(
            padding_mask_of_call(module, args, kwargs, self._attention_mask), kwargs
        )

    def _read_input(self, k: int, target: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._record(target, read_input(args, kwargs, self.stack[k]))
        if self._stop and k == self.blocks[-1] and not (self.outputs or self._inner):
            raise ForwardStopped(_STOPPED)

    def _read_output(self, k: int, target: int, args: tuple[Any, ...], output: Any) -> None:
        self._record(target, read_output(output))
        if self._stop and k == self.blocks[-1]:
            raise ForwardStopped(_STOPPED)

    def _convert(self, state: Tensor, batch_first: Callable[[Tensor], Tensor]) -> Tensor:
        # The output of a block is usually the input of the next: such a tensor is copied once. A compiler cannot trace
        # versions and addresses.
        compiling = torch.compiler.is_compiling()
        version = None if compiling or state.is_inference() else state._version
        if self._latest is not None and self._latest[0] is state and self._latest[1] == version is not None:
            return self._latest[2]
        if self._config.detach:
            recorded = self._select_tokens(state.detach(), batch_first).to(
                device=self._config.device, dtype=self._config.dtype
            )
            if compiling or recorded.data_ptr() == state.data_ptr():
                recorded = recorded.clone()  # a block may modify its input in place
        elif self._with_graph and not torch.is_grad_enabled():
            raise StreamlineError(
                "detach=False records states with their graph, but a block ran without gradients inside a forward pass "
                "with gradients, as in gradient checkpointing with use_reentrant=True. Use use_reentrant=False, or "
                "detach=True."
            )
        else:
            # Checkpointing counts the tensors that a block saves for its backward pass; these are not part of them.
            with nullcontext() if compiling else saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                recorded = self._select_tokens(state, batch_first).to(
                    device=self._config.device, dtype=self._config.dtype
                )
            if self._config.retain_grad and recorded.requires_grad:
                recorded.retain_grad()
        self._latest = (state, version, recorded)
        return recorded

    def _select_tokens(self, state: Tensor, batch_first: Callable[[Tensor], Tensor]) -> Tensor:
        if isinstance(self._tokens, Tensor) or self._tokens != "all":
            state = state if state.is_nested else batch_first(state)
        if isinstance(self._tokens, Tensor):
            state = padded(state, self._tokens.shape[1])
            mask = self._tokens.to(state.device).bool()
            if mask.shape != state.shape[:2]:
                raise StreamlineError(
                    f"tokens is a mask of shape {tuple(mask.shape)}. Expected {tuple(state.shape[:2])}, the (batch, "
                    "tokens) of the states. Pass a mask with one entry per token."
                )
            return state[mask]
        call_mask = self._attention_mask
        if state.is_nested:
            width = call_mask.shape[1] if isinstance(call_mask, Tensor) else None
            call_mask, state = nested_mask(state, width), padded(state, width)
        if self._tokens == "all":
            return state
        if call_mask is not None and not (isinstance(call_mask, Tensor) and call_mask.ndim == 2):
            raise StreamlineError(
                f"tokens={self._tokens!r} requires an attention mask of shape (batch, tokens), but the model was "
                f"called with {tuple(call_mask.shape) if isinstance(call_mask, Tensor) else type(call_mask).__name__}. "
                "Record all tokens, or pass a mask as tokens."
            )
        if call_mask is None:
            call_mask = torch.ones(state.shape[:2], dtype=torch.bool)
        mask = mask_of_tokens(call_mask, state.shape[1], self._cached, has_last_tokens=self._has_last_tokens)
        mask = mask.to(state.device).bool()
        if mask.shape != state.shape[:2]:
            raise StreamlineError(
                f"tokens={self._tokens!r} requires a mask of shape {tuple(state.shape[:2])}, the (batch, tokens) of "
                f"the states, but the mask of the model's call has shape {tuple(call_mask.shape)}. Record all tokens, "
                "or pass a mask as tokens."
            )
        if self._tokens == "real":
            return state[mask]
        positions = torch.arange(state.shape[1], device=state.device)
        last = torch.where(mask, positions, -1).amax(dim=1)
        if (last < 0).any():
            raise StreamlineError(
                "A sequence has no real token. Expected at least one per sequence for tokens='last'. Remove it from "
                "the batch."
            )
        return state[torch.arange(len(state), device=state.device), last]


_STOPPED = "The recorder stopped the forward pass (stop=True). Run the model as record(**batch), which catches this."
