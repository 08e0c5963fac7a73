"""Change the activations of a model at standard sites while it runs.

The changes are the edits of `streamline_hooks.recording.edits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from streamline_hooks.core import (
    Batch,
    StreamlineError,
    UnsupportedSurgery,
    block_indices,
    cached_tokens,
    forget_compiled_graphs,
    mask_of_tokens,
    padding_mask_of_call,
    padding_mask_with_cache,
    refuse_compiled,
    refuse_replicated,
    validate_arguments,
)
from streamline_hooks.modeling import (
    BlockStack,
    ChangeHook,
    GraphCallback,
    OutermostCall,
    ReadHook,
    find_stack,
    in_backward,
    require_default_layout,
    require_whole_state,
)
from streamline_hooks.recording.edits import Edit, EditCall
from streamline_hooks.recording.resolve_sites import resolve_sites
from streamline_hooks.recording.sites import (
    MODEL_SITES,
    ContributionCheck,
    Site,
    SiteAccess,
    checked_sites,
)

Tokens = Literal["all", "real", "last"]
Steps = Literal["all", "prefill", "decode"]


Key = Site | tuple[Site, int]


class Intervention:
    """Change the activations of a model at standard sites inside a ``with`` statement.

    Sites are those of `HiddenStateRecorder`. At one site, hooks run in the order in which they were registered:

    - Modules that a `LayerSurgeon` spliced in run first, whenever they were inserted.
    - Interventions, recorders and hooks of the user follow in the order in which they were opened. A recorder that was
      opened before an intervention records the tensor before the change, one that was opened inside it records the
      changed tensor. A nested intervention changes the result of the outer one, and several edits of one site run in
      their order. Interventions may be closed in any order.
    - Indices of blocks refer to the model when the intervention is opened. A block that a surgeon then removes does not
      run, so that its edit is not applied, which is an error.

    On exit the hooks are removed; nothing else of the model is changed. Gradients flow through the edits. A model may
    be compiled with ``torch.compile`` inside the intervention if the edits are the same in each forward pass.

    Parameters
    ----------
    model : torch.nn.Module
        The model, not yet compiled.
    edits : mapping
        Edit, or a sequence of edits, for each (site, block) or site of the model, for instance
        ``{("attention.output", 3): Scale(0.5), "logits": Add(bias)}``. Negative blocks count from the end.
    tokens : {"all", "real", "last"}, torch.Tensor or iterable of int
        Tokens to change. "real" excludes padding, "last" is the last real token of each sequence, a boolean mask has
        the shape (batch, tokens), and integers number the real tokens of each sequence, negative ones from its end.
    steps : {"all", "prefill", "decode"} or iterable of int
        Forward passes to change. The prefill is step 0: a pass without cached tokens. Each following pass with cached
        tokens is a further step and has one token per sequence. A mask or integers as `tokens` require steps without
        cached tokens.
    stack, probe : optional
        See `HiddenStateRecorder`.

    Raises
    ------
    StreamlineError
        If an argument is invalid, the model is compiled, a value does not fit into its site, `steps` is set and a pass
        runs several tokens after cached ones, or, when it is closed, an edit was not applied although the model ran.
    UnsupportedSurgery
        When it is opened: if a site cannot be read or changed. In the first call of a block: if the changed
        contributions do not sum to its output.

    Examples
    --------
    Halve what the attention of block 3 adds at the last token:

    >>> import torch
    >>> from streamline_hooks.recording import Scale
    >>> from streamline_hooks.testing import tiny_model
    >>> model, ids = tiny_model("llama"), torch.tensor([[3, 4, 5]])
    >>> with torch.no_grad(), Intervention(model, {("attention.output", 3): Scale(0.5)}, tokens="last"):
    ...     changed = model(ids).logits
    >>> (changed != model(ids).logits).any(-1)
    tensor([[False, False,  True]])
    """

    @validate_arguments()
    def __init__(
        self,
        model: nn.Module,
        edits: Mapping[Any, Any],
        *,
        tokens: str | Tensor | Iterable[int] = "all",
        steps: str | Iterable[int] = "all",
        stack: str | None = None,
        probe: Batch | Tensor | None = None,
    ) -> None:
        self.model, self.stack = model, find_stack(model, stack)
        self._edits = _checked_edits(edits, len(self.stack))
        self._tokens = _checked_tokens(tokens)
        self._steps = _checked_steps(steps)
        self._probe = probe
        self._handles: list[RemovableHandle] = []
        self._passes = _Passes(self.stack)
        self._applied: set[int] = set()
        self._note_applied = GraphCallback(self._applied.add)
        self._verify_tokens = GraphCallback(self._require_tokens)
        self._refuse = GraphCallback(self._refuse_compiled)

    def __enter__(self) -> Self:
        if self._handles:
            raise StreamlineError("This intervention is already open. Create a second Intervention to nest them.")
        refuse_compiled(self.model, "change the activations of")
        self.stack = find_stack(self.model, self.stack.path)
        block_indices([k for _, k in self._edits if k is not None], len(self.stack), "edits")
        refuse_replicated(self.model, "change the activations of")
        require_whole_state(self.stack[0])
        require_default_layout(
            [self.stack[k] for _, k in self._edits if k is not None],
            f"The activations of {type(self.model).__name__} cannot be changed",
            "Record them, or use hooks of your own.",
        )
        accesses = resolve_sites(self.stack, self._edits, self._probe)
        for access in accesses:
            if access.refusal:
                raise UnsupportedSurgery(
                    f"{access} can be recorded but not changed: {access.refusal}. Expected a contribution that a "
                    "submodule returns. Choose another site, such as block.output.",
                    "branches",
                )
        self._passes = _Passes(self.stack)
        self._applied.clear()
        try:
            self._handles += self._passes.hooks()
            for number, (access, edits) in enumerate(zip(accesses, self._edits.values(), strict=True)):
                for handle in access.hooks(partial(self._change, number, access, edits), ChangeHook):
                    self._handles.append(handle)
            contributions = {a.k: a.branches for a in accesses if a.k is not None and a.site.endswith(".output")}
            for k, sites in contributions.items():
                for handle in ContributionCheck(k, self.stack[k], sites).hooks() if sites is not None else ():
                    self._handles.append(handle)
            forget_compiled_graphs()
        except BaseException:
            self._remove_hooks()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ran = self._passes.number >= 0
        self._remove_hooks()
        missed = [_name(key) for number, key in enumerate(self._edits) if number not in self._applied]
        if kind is None and ran and missed:
            raise StreamlineError(
                f"The edits of {', '.join(missed)} were not applied, although the model ran {self._passes.number + 1} "
                "times. Expected each edit to be applied at least once. Check steps and tokens, and whether the blocks "
                "run."
            )

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _change(self, number: int, access: SiteAccess, edits: Sequence[Edit], state: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling() and not self._can_compile(edits):
            self._refuse(number)
            return None
        self._require_one_pending_pass(edits)
        if self._steps != "all" and self._passes.cached and not state.is_nested:
            self._require_one_token(access.by_token(state).shape[1])
        if not self._is_selected_step():
            return None
        if state.is_nested:
            raise StreamlineError(
                f"{access} is a nested tensor, which cannot be changed. Expected padded states. Run the model with "
                "gradients enabled, or build nn.TransformerEncoder with enable_nested_tensor=False."
            )
        before = access.by_token(state)
        real = self._passes.real_tokens(before, str(access), required=self._tokens != "all")
        selected = self._select(number, before, real)
        present = 0 if torch.compiler.is_compiling() else self._passes.number
        call = EditCall(str(access), real, present, access.feature_axes)
        after = before
        for edit in edits:
            changed = edit.change(after, call)
            if changed.shape != before.shape:
                raise StreamlineError(
                    f"{type(edit).__name__} at {access} returned the shape {tuple(changed.shape)}. Expected "
                    f"{tuple(before.shape)}. Correct its change()."
                )
            changed = changed.to(before)
            if selected is not None:
                changed = torch.where(selected.view(*selected.shape, *[1] * access.feature_axes), changed, after)
            after = changed
        self._note_applied(number)
        return after.reshape(state.shape) if after.ndim != state.ndim else after

    def _can_compile(self, edits: Sequence[Edit]) -> bool:
        selects_pass = self._steps != "all" or not isinstance(self._tokens, str)
        return all(edit.can_compile for edit in edits) and (self._passes.cached == 0 or not selects_pass)

    def _refuse_compiled(self, number: int) -> None:
        raise StreamlineError(
            f"The edit of {self._name(number)} cannot be compiled, because the graph knows neither the number of the "
            "forward pass nor its cached tokens. Expected an edit whose can_compile is True (not Resample, Mean "
            "without states or Patch with several), and with a cache steps='all' and tokens of 'all', 'real' or "
            "'last'. Change it, or run the model without torch.compile."
        )

    def _require_one_token(self, tokens: int) -> None:
        if tokens > 1:
            raise StreamlineError(
                f"A forward pass runs {tokens} tokens after {self._passes.cached} cached ones: a part of a prompt, or "
                f"a check of drafted tokens, so its step is unknown. steps={self._steps!r} expects one token in each "
                "pass with a cache. Run the prompt in one pass without assisted generation, or omit steps."
            )

    def _is_selected_step(self) -> bool:
        if self._steps == "all":
            return True
        step = self._passes.step
        if self._passes.cached is None:
            raise StreamlineError(
                "The decoding step is unknown: the cache of the model's call does not report its length. Expected a "
                "cache with get_seq_length(). Omit steps, or open an intervention for each step."
            )
        if self._steps == "decode":
            return step > 0
        return step in self._steps

    def _require_one_pending_pass(self, edits: Sequence[Edit]) -> None:
        """Raise if gradient checkpointing runs a block again for a pass that is not the last."""
        depends = self._steps != "all" or self._tokens != "all" or any(edit.depends_on_pass for edit in edits)
        if in_backward():
            self._passes.recomputed = True
            if depends and self._passes.pending > 1:
                raise StreamlineError(
                    "Gradient checkpointing runs a block again after several forward passes, whose steps and tokens "
                    "are no longer known. Expected one forward pass before each backward pass. Open an intervention "
                    "for each forward pass, or disable gradient checkpointing."
                )

    def _select(self, number: int, state: Tensor, real: Tensor) -> Tensor | None:
        """Return the mask of the tokens of a site to change, (batch, tokens), or None for all."""
        tokens = self._tokens
        if isinstance(tokens, str):
            if tokens == "all":
                return None
            if tokens == "real":
                return real
        elif self._passes.cached != 0:
            raise StreamlineError(
                f"tokens={tokens!r} number the tokens of a prompt, but a forward pass with cached tokens runs. "
                "Expected passes without a cache. Pass steps='prefill', or tokens='last'."
            )
        if not isinstance(tokens, Tensor):
            self._verify_tokens(number, real.sum(dim=1))
            return _numbered(real, (-1,) if isinstance(tokens, str) else tokens)
        if tokens.shape != state.shape[:2]:
            raise StreamlineError(
                f"tokens is a mask of shape {tuple(tokens.shape)}. Expected {tuple(state.shape[:2])}, the (batch, "
                f"tokens) at {self._name(number)}. Pass a mask with one entry per token."
            )
        return tokens.to(state.device)

    def _require_tokens(self, site: int, counts: Tensor) -> None:
        """Raise if a token that `tokens` numbers does not exist in a sequence with this number of real tokens."""
        shortest = int(counts.min())
        for number in (-1,) if isinstance(self._tokens, str) else self._tokens:
            if not -shortest <= number < shortest:
                raise StreamlineError(
                    f"Token {int(number)} does not exist in every sequence at {self._name(site)}: the shortest has "
                    f"{shortest} real tokens. Expected numbers of real tokens. Pass a mask to change other tokens in "
                    "each sequence."
                )

    def _name(self, number: int) -> str:
        return _name(list(self._edits)[number])


class _Passes:
    """The forward passes of a model: their number, step, cached tokens, and mask of real tokens."""

    def __init__(self, stack: BlockStack) -> None:
        self.number, self.step = -1, 0
        self.cached: int | None = 0
        self.pending, self.recomputed = 0, False
        self._stack, self._mask = stack, None
        self._call = OutermostCall()
        self._count = GraphCallback(self._add_pass)

    def hooks(self) -> list[RemovableHandle]:
        """Register hooks on the models around the stack."""
        handles = self._call.hooks(self._stack.ancestors)
        for module in self._stack.ancestors:
            hook = ReadHook(module, partial(self._enter, module))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call.begins(module):
            self._mask = None
            self.cached = cached_tokens(module, args, kwargs)
            if self.cached == 0:
                self.step = 0
            elif not torch.compiler.is_compiling():
                self.step += 1
            self._count(0)
        mask = padding_mask_of_call(module, args, kwargs, self._mask)
        self._mask = padding_mask_with_cache(mask, kwargs)

    def _add_pass(self, key: int) -> None:
        self.number += 1
        if self.recomputed or self.pending == 0:
            self.pending, self.recomputed = int(torch.is_grad_enabled()), False
        else:
            self.pending += 1

    def real_tokens(self, state: Tensor, name: str, required: bool) -> Tensor:
        """Return the mask of the real tokens of a state, (batch, tokens)."""
        mask: Any = self._mask
        if mask is None:
            return torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask_of_tokens(mask, state.shape[1], self.cached, has_last_tokens=name == "logits")
            if real.shape == state.shape[:2]:
                return real.to(state.device).bool()
        if required:
            raise StreamlineError(
                f"The tokens at {name} cannot be selected: the mask of the model's call does not have the shape "
                f"{tuple(state.shape[:2])} (batch, tokens). Expected one entry per token. Pass tokens='all' or such a "
                "mask."
            )
        return torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)


def _numbered(real: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return the mask of the real tokens with these numbers in each sequence, (batch, tokens)."""
    counts = real.sum(dim=1, keepdim=True)
    positions = real.cumsum(dim=1) - 1
    selected = torch.zeros_like(real)
    for number in numbers:
        selected = selected | (real & (positions == (counts + number if number < 0 else number)))
    return selected


def _name(key: tuple[Site, int | None]) -> str:
    site, k = key
    return site if k is None else f"{site} of block {k}"


def _checked_edits(edits: Mapping[Any, Any], length: int) -> dict[tuple[Site, int | None], tuple[Edit, ...]]:
    """Return the edits by site and block, or raise if one is invalid."""
    result: dict[tuple[Site, int | None], tuple[Edit, ...]] = {}
    for key, value in edits.items():
        name, k = (key, None) if isinstance(key, str) else key if isinstance(key, tuple) and len(key) == 2 else ("", 0)
        if not isinstance(name, str) or not name:
            raise StreamlineError(
                f"edits has the key {key!r}. Expected (site, block), or the name of a site of the model "
                f"({', '.join(MODEL_SITES)}). Write ('block.output', 3)."
            )
        (site,) = checked_sites(name)
        if (site in MODEL_SITES) != (k is None):
            raise StreamlineError(
                f"edits has the key {key!r}. Expected a block for a site of a block, and none for "
                f"{', '.join(MODEL_SITES)}. Write ({site!r}, 3)."
                if k is None
                else f"edits has the key {key!r}, but a model has only one {site}. Expected no block. Write {site!r}."
            )
        if k is not None:
            (k,) = block_indices([k], length, "edits")
        chosen = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not chosen or not all(isinstance(edit, Edit) for edit in chosen):
            raise StreamlineError(
                f"The edit of {_name((site, k))} is {value!r}. Expected an Edit or a sequence of them, such as "
                "Scale(0.5) or Add(vector). Wrap a tensor in Replace."
            )
        if (site, k) in result:
            raise StreamlineError(
                f"edits names {_name((site, k))} twice. Expected each site once. Pass a sequence of edits for it."
            )
        result[site, k] = chosen
    if not result:
        raise StreamlineError("edits={} is empty. Expected at least one edit. Write {('block.output', 3): Zero()}.")
    return result


def _checked_tokens(tokens: Any) -> Tokens | Tensor | tuple[int, ...]:
    if isinstance(tokens, str):
        if tokens not in get_args(Tokens):
            raise StreamlineError(
                f"tokens={tokens!r} is unknown. Expected 'all', 'real', 'last', a boolean mask (batch, tokens) or "
                "integers. Correct it."
            )
        return tokens  # type: ignore[return-value]
    if isinstance(tokens, Tensor) and (tokens.dtype == torch.bool or tokens.ndim == 2):
        return tokens.bool()
    numbers = tuple(int(number) for number in tokens)
    if not numbers:
        raise StreamlineError("tokens=[] selects no token. Expected at least one. Omit tokens to change all.")
    return numbers


def _checked_steps(steps: Any) -> Literal["all", "decode"] | frozenset[int]:
    if isinstance(steps, str):
        if steps not in get_args(Steps):
            raise StreamlineError(
                f"steps={steps!r} is unknown. Expected 'all', 'prefill', 'decode' or integers. Correct it."
            )
        return frozenset({0}) if steps == "prefill" else steps  # type: ignore[return-value]
    numbers = frozenset(int(step) for step in steps)
    if not numbers or min(numbers) < 0:
        raise StreamlineError(
            f"steps={sorted(numbers)} is invalid. Expected at least one step, from 0 (the prefill). Omit steps to "
            "change all."
        )
    return numbers
