"""A source of hidden states that runs a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    Batches,
    StreamlineError,
    UnsupportedSurgery,
    count_tokens,
    prepare_inputs,
    progress_bar,
)
from streamline_hooks.modeling import (
    BlockStack,
    BoundaryStates,
    Candidate,
    StateSource,
    Variant,
    VariantOutputs,
    WindowSums,
    closing_generator,
    find_stack,
    inference,
    saved_weights,
)
from streamline_hooks.recording import BlockSite, HiddenStateRecorder
from streamline_hooks.surgery.resume import resume
from streamline_hooks.surgery.splice import BEFORE, run_splices
from streamline_hooks.surgery.token_outputs import (
    agrees_with_forward,
    has_large_logits,
    last_state,
    lm_head_of,
    outputs_by_token,
    split_large_batches,
)


class ModelSource(StateSource):
    """Provide the hidden states of a model in memory, one batch after the other.

    Parameters
    ----------
    model : torch.nn.Module
    stack : str or BlockStack, optional
        The stack, or its path, see `find_stack`.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_model
    >>> source = ModelSource(tiny_model("llama"))
    >>> with source.boundary_states([torch.arange(3, 15).view(2, 6)], 2, "example") as batches:
    ...     [tuple(state.shape) for batch in batches for state in batch.states]
    [(2, 6, 32), (2, 6, 32), (2, 6, 32)]
    """

    in_memory = True

    def __init__(self, model: nn.Module, stack: str | BlockStack | None = None) -> None:
        self.model, self._stack = model, stack

    @cached_property
    def stack(self) -> BlockStack:  # noqa: D102 (see StateSource)
        return self._stack if isinstance(self._stack, BlockStack) else find_stack(self.model, self._stack)

    def saved_weights(self) -> Iterator[tuple[str, Tensor]]:  # noqa: D102
        return saved_weights(self.model)

    def current(self) -> ModelSource:  # noqa: D102
        return ModelSource(self.model, self.stack.path)

    def groups(self, batches: Batches, blocks: int) -> list[Sequence[int]]:  # noqa: D102
        return [range(len(batches))]

    @closing_generator
    def boundary_states(self, batches: Batches, blocks: int, desc: str) -> Generator[BoundaryStates, None, None]:  # noqa: D102
        length = len(self.stack)
        whole = blocks == length  # otherwise the last state is the input of block `blocks`
        chosen = None if whole else range(blocks + 1)
        sites: tuple[BlockSite, ...] = ("block.input", "block.output") if whole else ("block.input",)
        record = HiddenStateRecorder(self.model, chosen, sites=sites, stop=True, stack=self.stack.path)
        with record.over(batches, f"{desc}: {blocks} of {length} blocks, no head") as passed:
            for number, recorded in enumerate(passed):
                states = [recorded.entering(k) for k in record.blocks]
                states += [recorded.leaving(blocks - 1)] if whole else []
                yield BoundaryStates(number, slice(None), states, recorded.real)

    @closing_generator
    def window_sums(  # noqa: D102
        self,
        parts: Sequence[tuple[str, Batches]],
        windows: Sequence[range],
        make: Callable[[int, int], WindowSums],
        *,
        rerun: Sequence[int] | None = None,
    ) -> Generator[tuple[int, list[Any]], None, None]:
        needed = sorted({w.start for w in windows} | {w.stop - 1 for w in windows})
        summed: list[list[Any]] = [[None] * len(parts) for _ in windows]
        for part, (label, batches) in enumerate(parts):
            record = HiddenStateRecorder(self.model, needed, stop=True, stack=self.stack.path)
            cost = f"{label}: {len(windows)} windows, {max(needed) + 1} of {len(self.stack)} blocks"
            with record.over(batches, cost) as passed:
                for batch in passed:
                    for number, window in enumerate(windows):
                        entering = record.inputs[window.start][0]
                        if summed[number][part] is None:
                            summed[number][part] = make(number, entering.shape[-1])
                        summed[number][part].update(entering, record.outputs[window.stop - 1][0], batch.real)
        for number in range(len(windows)):
            sums, summed[number] = summed[number], []
            yield number, sums

    @closing_generator
    def outputs(  # noqa: D102
        self, batches: Batches, variants: Sequence[Variant], desc: str, original: nn.Module | None = None
    ) -> Generator[VariantOutputs, None, None]:
        if self._runs_by_token(batches, original):
            yield from self._outputs_by_token(batches, variants, desc, original)
            return
        candidates = [variant for variant in variants if isinstance(variant, Candidate)]
        if len(candidates) == len(variants) and candidates:
            yield from self._candidate_outputs(batches, candidates, desc, original)
            return
        model = self.model
        reference = original or model
        tokens = [count_tokens(batch) for batch in batches]
        with inference(model), progress_bar((1 + len(variants)) * sum(tokens), desc) as bar:

            def run(surgery: Any, inputs: dict[str, Any], count: int) -> Any:
                with surgery():
                    output = model(**inputs)
                bar.update(count)
                return output

            for number, (batch, count) in enumerate(zip(batches, tokens, strict=True)):
                inputs = prepare_inputs(model, batch)
                output = reference(**prepare_inputs(reference, batch))
                bar.update(count)
                each = [partial(run, variant, inputs, count) for variant in variants]
                yield VariantOutputs(batch, inputs, output, each, number=number)

    def _candidate_outputs(
        self, batches: Batches, candidates: Sequence[Candidate], desc: str, original: nn.Module | None
    ) -> Generator[VariantOutputs, None, None]:
        record = HiddenStateRecorder(self.model, _starts(candidates), sites=["block.input"], stack=self.stack.path)
        total = (1 + len(candidates)) * sum(map(count_tokens, batches))
        with progress_bar(total, desc) as bar, record.over(batches) as passed:

            def run(candidate: Candidate, batch: Batch | Tensor) -> Any:
                output = _candidate_output(record, candidate, batch)
                bar.update(count_tokens(batch))
                return output

            for number, (batch, recorded) in enumerate(zip(batches, passed, strict=True)):
                bar.update(count_tokens(batch))
                each = [partial(run, candidate, batch) for candidate in candidates]
                output = recorded.output if original is None else original(**prepare_inputs(original, batch))
                yield VariantOutputs(batch, batch, output, each, number=number)

    def _runs_by_token(self, batches: Batches, original: nn.Module | None) -> bool:
        """Whether the logits of a batch are large, and can be computed for a few tokens at a time."""
        if not has_large_logits(self.model, batches):
            return False
        models, path = [self.model] if original is None else [self.model, original], self.stack.path
        return all(agrees_with_forward(model, path, batches) for model in models)

    def _outputs_by_token(
        self, batches: Batches, variants: Sequence[Variant], desc: str, original: nn.Module | None
    ) -> Generator[VariantOutputs, None, None]:
        """Run all blocks for each batch, and the modules after them for a few tokens at a time."""
        model, path = self.model, self.stack.path
        reference = model if original is None else original
        starts = _starts([variant for variant in variants if isinstance(variant, Candidate)])
        total = (1 + len(variants)) * sum(map(count_tokens, batches))
        with inference(model), inference(reference), progress_bar(total, desc) as bar:
            parts = [(n, part) for n, batch in enumerate(batches) for part in split_large_batches(model, [batch])]
            for number, batch in parts:  # parts, because the states of all variants are in memory
                blocks = [*starts, -1] if original is None else [-1]
                record = HiddenStateRecorder(reference, blocks, stop=True, stack=path)
                with record.over([batch]) as passed:
                    ((state, real),) = [(recorded.leaving(record.blocks[-1]), recorded.real) for recorded in passed]
                if original is not None and starts:
                    record = HiddenStateRecorder(model, starts, sites=["block.input"], stop=True, stack=path)
                    with record.over([batch]) as passed:
                        list(passed)
                states: list[Callable[[], Tensor] | UnsupportedSurgery] = []
                for variant in variants:
                    try:
                        states.append(partial(_same, self._last_state(variant, record, batch)))
                    except UnsupportedSurgery as error:
                        states.append(error)
                record.clear()
                with ExitStack() as opened:
                    head = opened.enter_context(lm_head_of(find_stack(model, path)))
                    own = head if original is None else opened.enter_context(lm_head_of(find_stack(original, path)))
                    yield from outputs_by_token(number, batch, real, state, states, (own, head), bar.update)

    def _last_state(self, variant: Variant, record: HiddenStateRecorder, batch: Batch | Tensor) -> Tensor:
        """Return the state of a variant after the last block."""
        model, path = self.model, self.stack.path
        if not isinstance(variant, Candidate):
            with variant():
                return last_state(model, path, partial(model, **prepare_inputs(model, batch)))
        if variant.window.stop == len(self.stack):
            return _candidate_state(record, variant)
        return last_state(model, path, partial(_candidate_output, record, variant, batch))


def _starts(candidates: Sequence[Candidate]) -> list[int]:
    return sorted({candidate.window.start for candidate in candidates})


def _same(state: Tensor) -> Tensor:
    return state


def _candidate_output(record: HiddenStateRecorder, candidate: Candidate, batch: Batch | Tensor) -> Any:
    state = _candidate_state(record, candidate)
    return resume(record.model, candidate.window.stop, state, batch, stack=record.stack.path)


def _candidate_state(record: HiddenStateRecorder, candidate: Candidate) -> Tensor:
    """Return the state that enters the block after the window of a candidate."""
    window, blocks = candidate.window, record.stack.blocks
    state = record.inputs[window.start][0]  # of the original's forward; resuming appends further inputs
    if candidate.module is not None:
        with inference(candidate.module):
            state = candidate.module(state)
    if window.stop < len(blocks):  # modules of an earlier surgery after the window stay
        state = run_splices(blocks[window.stop], BEFORE, state)
    return state


def as_state_source(model: nn.Module | StateSource, stack: str | None = None) -> StateSource:
    """Return a `ModelSource` of a model; return a `StateSource` unchanged.

    Parameters
    ----------
    model : torch.nn.Module or StateSource
    stack : str, optional
        Path of the stack, see `find_stack`. A source has a stack already.

    Returns
    -------
    StateSource

    Raises
    ------
    StreamlineError
        If `model` is a source of another stack than `stack`.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> source = as_state_source(tiny_model("llama"))
    >>> as_state_source(source) is source
    True
    """
    if not isinstance(model, StateSource):
        return ModelSource(model, stack)
    if stack is not None and stack != model.stack.path:
        raise StreamlineError(
            f"stack={stack!r} was given with a source of the stack {model.stack.path!r}. Expected no stack with a "
            "source. Leave it out."
        )
    return model
