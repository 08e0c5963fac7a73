"""Skip blocks for the tokens of a prompt, which only get keys and values there.

The method is that of POP (arXiv 2602.03295) and SwiftKV (arXiv 2410.03960): generation needs the keys and values of the
prompt in every block, but not the rest of a block's computation.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    StreamlineError,
    UnsupportedSurgery,
    describe_blocks,
    padding_mask_of_call,
    refuse_compiled,
    refuse_wrapped,
    validate_arguments,
)
from streamline_hooks.modeling import BlockStack, find_stack, part_of_model
from streamline_hooks.surgery.commit import commit_surgery
from streamline_hooks.surgery.layout import checked_window
from streamline_hooks.surgery.plan import Slot, SurgeryPlan
from streamline_hooks.surgery.prompt_skip_probe import learn_and_verify, text_config_of
from streamline_hooks.surgery.resume import resume
from streamline_hooks.surgery.save_guard import saved_model_depth, transformers_ancestors
from streamline_hooks.surgery.session import mark_skipping, refuse_committed_skip, refuse_open_surgery
from streamline_hooks.surgery.skipped_block import (
    CACHE_NAMES,
    SkippedBlock,
    SkippingPass,
    first_tokens,
    named_arguments,
    set_attribute,
)
from streamline_hooks.surgery.spliced_model import PROMPT_MAPS, describe_maps, resolve_model_path

LAST_TOKENS = 16
"""Default number of tokens at the end of a prompt that run every block (``benchmarks/results/prompt_skip.md``)."""
_SKIP = "_streamline_prompt_skip"


class PromptSkip:
    """Skip a window of blocks for the tokens of a prompt inside a ``with`` statement.

    In a skipped block, a token of the prompt only gets keys and values. They are computed from an estimate of the state
    that enters the block, which `maps` compute from the state that enters the window. The first token of a sequence,
    which carries massive activations, the last tokens of the prompt, and all generated tokens run every block.
    `generate` determines the prompt: all tokens that it is given and that are not in its cache, except the last
    `last_tokens`. A plain forward pass skips only the tokens that `marked` names. When the ``with`` statement ends, the
    model is what it was.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model with a cache of keys and values.
    window : range
        Consecutive blocks to skip.
    maps : sequence of torch.nn.Module or None
        For each block of the window, a map from the state that enters the window, (batch, tokens, features), to an
        estimate of the state that leaves the block. None takes the estimate of the block before. By default, all are
        None. The map of the last block of the model has no effect on other tokens.
    last_tokens : int
        Number of tokens at the end of a prompt that run every block; at least 1, because the last one predicts the
        first token after the prompt. Default 16, because chat templates end with several tokens of their own. A prompt
        of up to `last_tokens` + 1 tokens skips nothing.
    stack : str, optional
        Path of the stack, if the model has several; see `find_stack`.
    probe : bool
        Compare the model on a few tokens with a full forward pass in which the outputs of the skipped blocks are
        replaced, and refuse it unless they are equal; default True.

    Raises
    ------
    UnsupportedSurgery
        If blocks of the window have no cache of keys and values of their own (recurrent states, shared keys), or the
        probe finds a difference.
    StreamlineError
        If `last_tokens` is below 1, the model is compiled or wrapped, a surgeon is open on it, or the numbers of blocks
        and maps differ.

    Notes
    -----
    Hooks on a skipped block see the states of all tokens. Inside it, modules up to the keys and values are called
    twice, for all tokens and for those that run, and the others once. In the first call, hooks of projections of
    queries see zeros, of one head if the block accepts that. One thread at a time may generate, or run the model inside
    `marked`.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> model, prompt = tiny_model("llama"), torch.tensor([[3, 4, 5, 6, 7, 8]])
    >>> with PromptSkip(model, range(5, 8), last_tokens=2):
    ...     model.generate(prompt, max_new_tokens=2, do_sample=False).shape
    torch.Size([1, 8])
    """

    @validate_arguments(last_tokens=1)
    def __init__(
        self,
        model: nn.Module,
        window: range,
        maps: Sequence[nn.Module | None] | None = None,
        *,
        last_tokens: int = LAST_TOKENS,
        stack: str | None = None,
        probe: bool = True,
    ) -> None:
        refuse_compiled(model, "skip blocks of")
        refuse_wrapped(model)
        block_stack = find_stack(model, stack)
        refuse_open_surgery(block_stack, "PromptSkip")
        refuse_committed_skip(block_stack)
        checked = checked_window(window, len(block_stack))
        if maps is not None and len(maps) != len(checked):
            raise StreamlineError(
                f"PromptSkip: {len(maps)} maps were given for {describe_blocks(checked)}. Expected one, or None, for "
                "each block. Fit the maps for this window."
            )
        self._set_up(model, block_stack, checked, maps or [None] * len(checked), last_tokens)
        self._prepare(verify=probe)

    def _set_up(
        self, model: nn.Module, stack: BlockStack, window: range, maps: Sequence[nn.Module | None], last_tokens: int
    ) -> None:
        self.model, self.stack, self.window, self.maps, self.last_tokens = model, stack, window, list(maps), last_tokens
        self._blocks = [SkippedBlock(self, number, stack[k]) for number, k in enumerate(window)]
        self._pass = SkippingPass()
        self._marks: Tensor | None = None  # (batch, tokens), from `marked`
        self._pending = 0  # tokens of the prompt that `generate` has not run yet
        self._is_generating = self._is_open = self._is_committed = self._is_prepared = False
        self._running: nn.Module | None = None  # the outermost module whose forward runs
        self._thread: int | None = None  # the thread that generates or marks tokens
        self._original_generate: Any = None  # an attribute of the instance, instead of a method
        self._undo = ExitStack()

    def _prepare(self, verify: bool = True) -> None:
        """Learn how the blocks are called, which a model without weights cannot show, and verify the model."""
        if self._is_prepared:
            return
        for block in self._blocks:
            block.require_causal_masks()
        self._is_prepared = True  # the verification marks tokens
        try:
            learn_and_verify(self, verify)
        except BaseException:
            self._is_prepared = False
            raise

    def __enter__(self) -> Self:
        if self._is_committed or self._is_open:
            raise StreamlineError(
                "This PromptSkip is open or committed already. Expected one with statement. Create a new one."
            )
        refuse_open_surgery(self.stack, "PromptSkip")
        with ExitStack() as undo:
            undo.callback(mark_skipping(self.stack))
            undo.callback(set_attribute(self.model, _SKIP, self))
            self._install(undo)
            for owner in transformers_ancestors(self.stack):
                undo.callback(set_attribute(owner, "save_pretrained", _refuse_saving))
            self._undo, self._is_open = undo.pop_all(), True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        self._undo.close()

    def commit(self) -> None:
        """Make the skipping permanent; it is saved and loaded with the model.

        The maps become a submodule ``prompt_maps`` of the model. A saved checkpoint loads through
        ``AutoModelForCausalLM`` if this library is imported, and loading fails otherwise. The blocks of the model can
        no longer be changed by a `LayerSurgeon`.

        Raises
        ------
        UnsupportedSurgery
            If the model is not a Transformers model, or a checkpoint could not describe it.
        StreamlineError
            If the ``with`` statement is not open, or a map cannot be stored (see `register_module`).

        Examples
        --------
        >>> from streamline_hooks.testing import tiny_model
        >>> model, prompt = tiny_model("llama"), torch.tensor([[3, 4, 5, 6, 7, 8]])
        >>> with PromptSkip(model, range(5, 8)) as skip:
        ...     skip.commit()
        >>> prompt_skip_of(model).window
        range(5, 8)
        """
        if not self._is_open:
            raise StreamlineError("commit() was called outside of the with statement. Call it inside.")
        if saved_model_depth(self.stack) != 0:
            raise UnsupportedSurgery(
                f"PromptSkip: {type(self.model).__name__} is not a Transformers model that saves itself. Expected one. "
                "Keep the with statement open.",
                "prompt-skip",
            )
        maps = nn.ModuleDict({str(k): m for k, m in zip(self.window, self.maps, strict=True) if m is not None})
        slots = tuple(Slot(k, type(block).__name__) for k, block in enumerate(self.stack.blocks))
        plan = SurgeryPlan(self.stack.path, len(slots), slots)
        entry = {
            "stack": self.stack.path,
            "window": [self.window.start, self.window.stop],
            "last_tokens": self.last_tokens,
            "maps": describe_maps(maps),
        }
        setattr(self.model, PROMPT_MAPS, maps)
        try:
            commit_surgery(self.stack, 0, plan, (), {"prompt_skip": entry["window"]}, prompt_skip=entry)
        except BaseException:
            delattr(self.model, PROMPT_MAPS)
            raise
        self._undo.close()
        self._is_open = False
        self._install_permanently()

    def _install_permanently(self) -> None:
        with ExitStack() as undo:
            self._install(undo)
            undo.pop_all()
        self._is_committed = True
        vars(self.model)[_SKIP] = self

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self._is_open:
            return super().__reduce_ex__(protocol)
        raise StreamlineError(
            f"A {type(self.model).__name__} was copied or pickled inside an open PromptSkip, which the copy could not "
            "close. Expected a closed or committed one. Copy the model before."
        )

    @contextmanager
    def marked(self, tokens: Tensor) -> Iterator[None]:
        """Skip the blocks for exactly the marked tokens of each forward pass inside a ``with`` statement.

        `last_tokens` is not applied; see `streamline_hooks.distillation.prompt_of` for the tokens of a prompt.

        Parameters
        ----------
        tokens : torch.Tensor
            Boolean mask, (batch, tokens) of the forward pass. The first real token of a sequence runs every block,
            marked or not.

        Raises
        ------
        StreamlineError
            If the PromptSkip is neither open nor committed; and in the forward pass, if it has another number of
            sequences or tokens.

        Examples
        --------
        >>> from streamline_hooks.testing import tiny_model
        >>> model, ids = tiny_model("llama"), torch.tensor([[3, 4, 5, 6]])
        >>> with torch.no_grad(), PromptSkip(model, range(5, 8)) as skip:
        ...     with skip.marked(torch.tensor([[True, True, False, False]])):
        ...         skipped = model(ids).logits
        ...     torch.allclose(skipped[:, 0], model(ids).logits[:, 0], atol=1e-4)
        True
        """
        if not self._is_open and not self._is_committed:
            raise StreamlineError(
                "marked() was called outside of the with statement of its PromptSkip, where no block is skipped. Call "
                "it inside."
            )
        self._prepare()
        with self._marking(tokens):
            yield

    def resume(self, states: Tensor, batch: Batch | Tensor, tokens: Tensor) -> Any:
        """Run the model from the window to its output, and skip the window for the marked tokens.

        The blocks before the window do not run, so that a training loop computes their states once.

        Parameters
        ----------
        states : torch.Tensor
            State that enters the window, (batch, tokens, features).
        batch : mapping or torch.Tensor
            Input of the model's forward; see `resume`.
        tokens : torch.Tensor
            The tokens that skip, as for `marked`.

        Returns
        -------
        Any
            Output of the model's forward.

        Raises
        ------
        StreamlineError
            If the PromptSkip is open or committed, or a surgeon is open on the model.

        Examples
        --------
        >>> from streamline_hooks import HiddenStateRecorder
        >>> from streamline_hooks.testing import tiny_model
        >>> model, ids, tokens = tiny_model("llama"), torch.tensor([[3, 4, 5]]), torch.tensor([[True, True, False]])
        >>> with torch.no_grad(), HiddenStateRecorder(model, blocks=[6]) as record:
        ...     _ = model(ids)
        ...     logits = PromptSkip(model, range(6, 8)).resume(record.inputs[6][0], ids, tokens).logits
        >>> logits.shape
        torch.Size([1, 3, 64])
        """
        if self._is_open or self._is_committed:
            raise StreamlineError(
                "PromptSkip.resume was called inside the with statement or after commit. Expected a closed PromptSkip. "
                "Create one for training, and open another one to generate."
            )
        refuse_open_surgery(self.stack, "PromptSkip.resume")
        with ExitStack() as undo, self._marking(tokens):
            self._install(undo)
            return resume(self.model, self.window.start, states, batch, stack=self.stack.path)

    @contextmanager
    def _marking(self, tokens: Tensor) -> Iterator[None]:
        before = self._marks
        with self._inside_thread():
            self._marks = tokens.bool()
            try:
                yield
            finally:
                self._marks = before

    @contextmanager
    def _inside_thread(self) -> Iterator[None]:
        """Refuse other threads, whose tokens would be taken for those of the prompt."""
        outer, thread = self._thread, threading.get_ident()
        if outer not in (None, thread):
            raise _thread_error(self.model)
        self._thread = thread
        try:
            yield
        finally:
            self._thread = outer

    def _install(self, undo: ExitStack) -> None:
        """Register the hooks of the model, and replace `generate` and the forward of the blocks."""
        if self._is_committed:
            return
        for module in self.stack.ancestors:
            undo.callback(module.register_forward_pre_hook(self._enter_model, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(self._leave_model, always_call=True).remove)
        for block in self._blocks:
            undo.callback(block.install())
        if callable(getattr(self.model, "generate_batch", None)):
            undo.callback(set_attribute(self.model, "generate_batch", _refuse_batches))
        if callable(getattr(self.model, "generate", None)):
            self._original_generate = vars(self.model).get("generate")
            undo.callback(set_attribute(self.model, "generate", self._generate))

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self._prepare()
        before = self._pending, self._is_generating
        with self._inside_thread():
            # A call inside another one drafts tokens, which are not those of a prompt.
            prompt = 0 if self._is_generating else _prompt_tokens(args, kwargs)
            self._pending, self._is_generating = max(0, prompt - self.last_tokens), True
            try:
                if self._original_generate is not None:
                    return self._original_generate(*args, **kwargs)
                return type(self.model).generate(self.model, *args, **kwargs)  # type: ignore[attr-defined]
            finally:
                self._pending, self._is_generating = before

    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._marks is not None or self._pending > 0 or self._pass.is_needed:  # otherwise nothing breaks a graph
            self._enter_pass(module, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._thread not in (None, threading.get_ident()):
            raise _thread_error(self.model)
        if self._running in (None, module):  # a call of the same module was interrupted
            self._running = module
            self._pass = SkippingPass(is_needed=self._marks is not None or self._pending > 0)
            if not self._pass.is_needed:
                return
            _require_dense_masks(self.model)
            arguments = named_arguments(inspect.signature(module.forward), args, kwargs)
            cache = next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
            if cache is None and self._is_generating:
                raise StreamlineError(
                    "PromptSkip: generate runs the model without a cache of keys and values, so every step would run "
                    "the prompt again. Expected use_cache=True. Change the generation config."
                )
            if arguments.get("output_attentions", getattr(text_config_of(self.model), "output_attentions", False)):
                raise StreamlineError(
                    "PromptSkip: output_attentions=True was given, but skipped tokens have no attention. Expected "
                    "False. Leave it out, or run the model outside of the with statement."
                )
            modules = (*self.stack.ancestors, *self.stack.blocks)
            if module.training and any(getattr(m, "gradient_checkpointing", False) for m in modules):
                raise StreamlineError(
                    "PromptSkip: gradient checkpointing would run the skipped blocks again without their marks. "
                    "Expected a model without it. Call model.gradient_checkpointing_disable()."
                )
            self._pass.positions = arguments.get("position_ids")
            self._pass.cached = 0 if cache is None else int(cache.get_seq_length())
        if self._pass.is_needed:
            self._pass.mask = padding_mask_of_call(module, args, kwargs, self._pass.mask)

    def _leave_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._running is module:
            self._running = None

    def _begin(self, state: Tensor) -> None:
        """Determine which tokens of a forward pass skip the window that it enters."""
        tokens = state.shape[1]
        if self._marks is not None:
            if self._marks.shape != state.shape[:2]:
                raise StreamlineError(
                    f"PromptSkip: the mask of marked() has the shape {tuple(self._marks.shape)}, but the forward pass "
                    f"has {tuple(state.shape[:2])} (batch, tokens). Expected the same. Pass a mask for this batch."
                )
            marks = self._marks.to(state.device)
        else:
            marks = (torch.arange(tokens, device=state.device) < self._pending).expand(state.shape[:2])
            self._pending = max(0, self._pending - tokens)
        marks = marks & ~first_tokens(self._pass.mask, self._pass.cached, state, self._pass.positions)
        if bool(marks.any()):
            self._pass.skipped, self._pass.boundary = marks, state
            run = (~marks).any(dim=0)
            run[-1] |= ~run.any()  # blocks that run no token at all may behave differently
            self._pass.columns = run.nonzero().flatten()

    def _estimate(self, number: int, boundary: Tensor, state: Tensor) -> Tensor:
        """Return the estimate of the state that leaves a block of the window."""
        map_ = self.maps[number]
        if map_ is None:
            return state
        weight = next((p for p in map_.parameters() if p.is_floating_point()), boundary)
        estimate: Tensor = map_(boundary.to(weight))
        return estimate.to(state)


for _hook in (PromptSkip._enter_model, PromptSkip._leave_model):
    part_of_model(_hook)


@validate_arguments()
def prompt_skip_of(model: nn.Module) -> PromptSkip:
    """Return the open or committed prompt skipping of a model, for `PromptSkip.marked`.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    PromptSkip

    Raises
    ------
    StreamlineError
        If the model has none.
    """
    if (skip := find_prompt_skip(model)) is None:
        raise StreamlineError(
            f"This {type(model).__name__} has no open or committed PromptSkip. Expected a model inside the with "
            "statement of one, after PromptSkip.commit, or loaded from a folder that was saved after it. Use "
            "PromptSkip in a with statement."
        )
    return skip


def find_prompt_skip(model: nn.Module) -> PromptSkip | None:
    """Return the open or committed prompt skipping of a model, or None."""
    skip: PromptSkip | None = vars(model).get(_SKIP)
    return skip


def attach_prompt_skip(model: nn.Module, entry: Mapping[str, Any], maps: nn.ModuleDict) -> None:
    """Let a model that is being loaded skip blocks for prompts, as its checkpoint describes."""
    if not callable(getattr(model, "generate", None)):
        raise StreamlineError(
            f"The prompts of this checkpoint skip blocks, but a {type(model).__name__} has no prompts. Expected a "
            "causal language model. Load it with AutoModelForCausalLM."
        )
    stack = find_stack(model, resolve_model_path(model, entry["stack"]))
    setattr(model, PROMPT_MAPS, maps)
    window = checked_window(range(*entry["window"]), len(stack))
    skip = PromptSkip.__new__(PromptSkip)
    by_block = dict(maps.items())
    last_tokens = entry.get("last_tokens", 1)  # earlier formats have none
    skip._set_up(model, stack, window, [by_block.get(str(k)) for k in window], last_tokens)
    skip._install_permanently()


def _prompt_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the number of tokens that a call of `generate` adds to its cache.

    The inputs are all tokens so far or only the new ones; a mask always belongs to all.
    """
    cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    cached = 0 if cache is None else int(cache.get_seq_length())
    if cached and getattr(kwargs.get("generation_config"), "is_assistant", False):
        return 0  # it drafts tokens for another model
    mask = kwargs.get("attention_mask")
    inputs = [mask if isinstance(mask, Tensor) and mask.ndim == 2 else None, kwargs.get("inputs_embeds")]
    inputs += [*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")]
    tokens = next((value.shape[1] for value in inputs if isinstance(value, Tensor)), 0)
    return int(tokens) - cached


def _thread_error(model: nn.Module) -> StreamlineError:
    return StreamlineError(
        f"PromptSkip: two threads run this {type(model).__name__} at the same time. Expected one, because the tokens "
        "of one would be taken for the prompt of the other. Use a lock, or copy.deepcopy(model) for each thread."
    )


def _refuse_batches(*args: Any, **kwargs: Any) -> NoReturn:
    raise StreamlineError(
        "generate_batch was called on a model whose prompts skip blocks, but it would skip none. Expected generate. "
        "Call generate, or use the original model."
    )


def _refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    raise StreamlineError(
        "save_pretrained was called inside an open PromptSkip, whose maps it would not save. Expected a closed one. "
        "Leave the with statement to save the original."
    )


def _require_dense_masks(model: nn.Module) -> None:
    """Raise if the attention of a model does not take masks by query and key."""
    name = getattr(text_config_of(model), "_attn_implementation", None)
    if name not in (None, "sdpa", "eager"):
        raise UnsupportedSurgery(
            f"PromptSkip: the attention {name!r} takes no mask by query and key. Expected 'sdpa' or 'eager'. Call "
            "model.set_attn_implementation('sdpa').",
            "prompt-skip",
        )
