"""Run all batches through one block of a checkpoint before the next block is read.

A block may need more from earlier blocks than the hidden state, such as keys, routing or a second state. Each block is
therefore compared with a forward of the whole model on a few tokens, in which accelerate reads the weights layer by
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from streamline_hooks.checkpoint.offloaded import (
    PassJournal,
    StateStore,
    offloaded_identity,
    stored_bytes,
)
from streamline_hooks.core import (
    Batch,
    StreamlineError,
    UnsupportedSurgery,
    batches_digest,
    padding_mask,
    prepare_inputs,
    progress_bar,
    read_file,
    validate_arguments,
    weights_in_memory,
    write_file,
)
from streamline_hooks.data import check_document, packed_run_error, piece_as_batch, rows_with_most_documents
from streamline_hooks.modeling import (
    BlockStack,
    find_stack,
    inference,
    read_input,
    require_default_layout,
    require_finite,
    sum_order_tolerance,
    token_mask,
    write_input,
)
from streamline_hooks.recording import ForwardStopped, HiddenStateRecorder, RecordingConfig
from streamline_hooks.surgery import BEFORE, LayerSurgeon, find_hazards, per_layer_width, run_before, spliced

_REFERENCE_FILE = "reference.safetensors"
_SEQUENCES, _TOKENS = 2, 16  # of the forward of the whole model that blocks are compared with


class BlockRange(NamedTuple):
    """Hidden states that run through the blocks `start` to `stop` - 1, with the masks and positions of a batch."""

    batch: int
    start: int
    stop: int


@dataclass(frozen=True)
class StateStorage:
    """Storage of the hidden states of a `BlockwisePass`.

    Attributes
    ----------
    memory : int
        Bytes of hidden states in memory. Further states are in temporary files. 2 GiB by default.
    folder : str or Path, optional
        Folder for all hidden states of this pass, and of no other. An interrupted pass continues from it when it is
        started again with the same arguments. By default there is no such folder.
    run : mapping
        JSON values that must be equal for an interrupted pass to continue.

    Examples
    --------
    >>> from streamline_hooks.checkpoint import StateStorage
    >>> StateStorage(memory=10**6).folder is None
    True
    """

    memory: int = 2**31
    folder: str | Path | None = None
    run: Mapping[str, Any] = field(default_factory=dict)


class BlockwisePass:
    """Run all batches through one block after the other, and read the weights of each block once.

    Iterate to get the boundaries as they are reached: 0, the input of block 0, then k + 1 once all batches have passed
    block k. The hidden states at a boundary are kept until `drop` is called. The model's own forward makes masks,
    positions and rotary embeddings.

    Parameters
    ----------
    model : torch.nn.Module
        From `open_checkpoint`, or any other model.
    batches : sequence of mapping or torch.Tensor
        Inputs of the model's forward.
    stop : int, optional
        The first block that is not run. By default all blocks are run.
    storage : StateStorage, optional
        Where the hidden states are kept. By default 2 GiB of memory and temporary files.
    check : bool
        Whether to compare each block with a forward of the whole model on 32 tokens, which reads the weights once more.
    others : sequence of BlockRange
        Further hidden states, which `put` adds when the pass has reached their start. They are numbered after the
        batches.
    stack : str, optional
        Path of the stack, see `find_stack`.
    desc : str
        Label of the progress bar, which counts the bytes of the blocks.

    Attributes
    ----------
    folder : Path or None
    masks : list of torch.Tensor
        The real tokens of each batch, boolean, of shape (batch, tokens). They are set at the first boundary.

    Raises
    ------
    UnsupportedSurgery
        If a block needs more from earlier blocks than the hidden state.
    StreamlineError
        If there is no batch, `stop` is out of range, a state is not finite, or the folder cannot be used.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> with BlockwisePass(model, [torch.arange(3, 15).view(2, 6)], stop=2) as states:
    ...     for boundary in states:
    ...         print(boundary, tuple(states.read(boundary, 0).shape))
    ...         states.drop(boundary - 1)
    0 (2, 6, 32)
    1 (2, 6, 32)
    2 (2, 6, 32)
    """

    @validate_arguments(stop=0)
    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch | Tensor],
        *,
        stop: int | None = None,
        storage: StateStorage | None = None,
        check: bool = True,
        others: Sequence[BlockRange] = (),
        stack: str | None = None,
        desc: str = "block by block",
    ) -> None:
        self.model, self.batches = model, list(batches)
        self.stack = find_stack(model, stack)
        self.stop = len(self.stack) if stop is None else stop
        if self.stop > len(self.stack):
            raise StreamlineError(f"stop={stop} is out of range. Expected at most {len(self.stack)}. Change it.")
        storage = storage or StateStorage()
        self._ranges = [*(BlockRange(number, 0, self.stop) for number in range(len(self.batches))), *others]
        require_streamable(self.stack, self.stop)
        self._splices = [spliced(block, BEFORE) for block in self.stack.blocks]
        self.folder = None if storage.folder is None else Path(storage.folder)
        self._check, self._desc = check, desc
        self._store = StateStore(storage.memory, self.folder)
        self._journal: PassJournal | None = None
        if self.folder is not None:
            identity = {**offloaded_identity(self.stack), "batches": batches_digest(self.batches), "stop": self.stop}
            ways = {"ways": [[*block_range] for block_range in self._ranges]} if others else {}
            self._journal = PassJournal(self.folder, {**identity, **ways, **storage.run})
        self.masks: list[Tensor] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._store.close()

    def __iter__(self) -> Iterator[int]:
        reached = self._journal.boundary if self._journal else None
        probe = probe_batch(self.batches[0])
        reference = self._reference_states(probe) if self._check else []
        self._record_inputs(write=reached is None)
        if reached is None:
            reached = self.advance(0)
        probe_state = reference[reached] if reference else None
        real = token_mask(reference[0], padding_mask(probe)).cpu() if reference else torch.empty(0)
        costs = [stored_bytes(block) for block in self.stack.blocks[: self.stop]]
        label = f"{self._desc}: {self.stop} of {len(self.stack)} blocks, each read once"
        with progress_bar(sum(costs), label, "B", sum(costs[:reached])) as bar:
            yield reached
            for k in range(reached, self.stop):
                with self.blocks_in_memory(range(k, k + 1)) as through:
                    if probe_state is not None:
                        with inference(self.model):  # restores what a rotary embedding caches for the probe
                            probe_state = self._spliced(k + 1, self._run_probe(k, through, probe_state, probe))
                        compare_with_whole_model(self.stack, k + 1, probe_state, reference, real)
                    numbers = [
                        n for n, block_range in enumerate(self._ranges) if block_range.start <= k < block_range.stop
                    ]
                    for done, number in enumerate(numbers):
                        state = through(self.entering(k, number), self.batches[self._ranges[number].batch])
                        if number < len(self.batches):
                            require_finite(state, self.masks[number], f"leaves block {k}", number)
                        self._store.keep(k + 1, number, state)
                        bar.update(costs[k] * (done + 1) // len(numbers) - costs[k] * done // len(numbers))
                yield self.advance(k + 1)

    def read(self, boundary: int, batch: int) -> Tensor:
        """Return the hidden states of a batch at a boundary, (batch, tokens, features). Do not change them."""
        return self._store.read(boundary, batch)

    def entering(self, boundary: int, batch: int) -> Tensor:
        """Return the input of the block after a boundary: the state of `read`, after the modules spliced in there."""
        return self._spliced(boundary, self.read(boundary, batch))

    def _spliced(self, boundary: int, state: Tensor) -> Tensor:
        # The recorded input of block 0 has passed its splices. Those of a later block move while it is the first.
        for module in self._splices[boundary] if 0 < boundary < len(self.stack) else ():
            with inference(module):
                state = module(state).to(state.dtype)
        return state

    def add(self, number: int, state: Tensor) -> None:
        """Add hidden states that run through the blocks from the present boundary on.

        A continued pass has the states that were added before its boundary. The values need not be finite.

        Parameters
        ----------
        number : int
            Number of an entry of `others` that starts at the boundary that the pass has reached.
        state : torch.Tensor
            Of shape (batch, tokens, features), as the states of its batch.
        """
        self._store.keep(self._ranges[number].start, number, state)

    def drop(self, boundary: int) -> None:
        """Drop the hidden states at a boundary, which must not be the last that was reached."""
        self._store.drop(boundary)

    def drop_all_except(self, boundaries: Collection[int], reached: int) -> None:
        """Drop the hidden states at all boundaries before `reached` that are not in `boundaries`."""
        for boundary in set(range(reached)).difference(boundaries):
            self._store.drop(boundary)

    def delete_folder(self) -> None:
        """Delete the folder, once the results of the pass are stored elsewhere."""
        if self._journal is not None:
            self._journal.clear()

    def advance(self, boundary: int) -> int:
        """Record that a boundary was reached, and return it."""
        if self._journal is not None:
            self._journal.advance(boundary)
        return boundary

    def _reference_states(self, probe: dict[str, Any]) -> list[Tensor]:
        file = None if self.folder is None else self.folder / _REFERENCE_FILE
        if file is not None and file.is_file():
            tensors, _ = read_file(file, "states of the whole model")
            return [tensors[str(boundary)] for boundary in range(len(tensors))]
        reference = reference_states(self.stack, probe)
        if file is not None:
            write_file(file, {str(boundary): state for boundary, state in enumerate(reference)}, {})
        return reference

    def _record_inputs(self, write: bool) -> None:
        """Record the inputs of block 0 and their real tokens."""
        record = HiddenStateRecorder(self.model, [0], sites=["block.input"], stop=True, stack=self.stack.path)
        self.masks = []
        with inference(self.model), record:
            for number, batch in enumerate(self.batches):
                record.clear()
                inputs = prepare_inputs(self.model, batch)
                record(**inputs)
                state = record.inputs[0][0]
                self.masks.append(token_mask(state, padding_mask(inputs)).cpu())
                if write:
                    require_finite(state, self.masks[number], "enters block 0", number)
                    self._store.keep(0, number, state)

    @contextmanager
    def blocks_in_memory(self, blocks: range) -> Iterator[Callable[[Tensor, Batch | Tensor], Tensor]]:
        """Load consecutive blocks as the first of the model, and yield a function that runs them.

        The function takes the input state of the first of these blocks, and the batch that masks and positions are made
        from. It returns the output state of the last.
        """
        first = self.stack[blocks.start]
        entering: list[Tensor] = []

        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            embedded = read_input(args, kwargs, block)
            state = entering[0].to(device=embedded.device, dtype=embedded.dtype, copy=True)
            return write_input(args, kwargs, state, block)

        with ExitStack() as opened:
            for k in blocks:
                opened.enter_context(weights_in_memory(self.stack[k]))
            surgeon = opened.enter_context(LayerSurgeon(self.model, self.stack.path, probe=False))
            if blocks.start:
                surgeon.remove(range(blocks.start))
            last = len(blocks) - 1
            record = HiddenStateRecorder(self.model, [last], sites=["block.output"], stop=True, stack=self.stack.path)
            opened.callback(entering.clear)
            opened.callback(first.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
            hooks: Any = first._forward_pre_hooks  # `enter` runs before all hooks but the splices of block 0
            for key in [key for key, hook in hooks.items() if hook is run_before]:
                hooks.move_to_end(key, last=False)
            opened.enter_context(inference(self.model))
            opened.enter_context(record)

            def through(state: Tensor, batch: Batch | Tensor) -> Tensor:
                entering[:] = [state]
                record.clear()
                record(**prepare_inputs(self.model, batch))
                return record.outputs[last][0]

            yield through

    def _run_probe(self, k: int, through: Any, state: Tensor, probe: dict[str, Any]) -> Tensor:
        try:
            return through(state, probe)  # type: ignore[no-any-return]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise UnsupportedSurgery(
                f"{type(self.model).__name__} cannot be run block by block: without the blocks before it, block {k} "
                f"fails ({type(error).__name__}: {error}). Load the model into memory.",
                "cannot-run",
            ) from error


def require_streamable(stack: BlockStack, stop: int) -> None:
    """Raise if one of the first `stop` blocks is known to need more than the hidden state."""
    refusal, advice = f"{type(stack.model).__name__} cannot be run block by block", "Load it into memory."
    require_default_layout(stack.blocks, refusal, advice)
    if getattr(getattr(stack.model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedSurgery(f"{refusal}: the blocks of its decoder need the output of its encoder. {advice}")
    if per_layer_width(stack):
        raise UnsupportedSurgery(
            f"{refusal}: each block has a second input in addition to the state (per-layer embeddings). {advice}"
        )
    for k in range(1, stop):
        if hazards := find_hazards(stack, range(k)):
            raise UnsupportedSurgery(f"{refusal}: {hazards[0]}. {advice}", hazards[0].cause)


def probe_batch(batch: Batch | Tensor) -> dict[str, Any]:
    """Return 16 tokens of two sequences of a batch, the last ones if the padding is on the left."""
    inputs: dict[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    mask = padding_mask(inputs)
    shape = next(value for value in inputs.values() if isinstance(value, Tensor)).shape[:2]
    left = isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:_SEQUENCES, 0].all())
    tokens = slice(-_TOKENS, None) if left else slice(0, _TOKENS)
    return {
        name: value[:_SEQUENCES, tokens] if isinstance(value, Tensor) and value.shape[:2] == shape else value
        for name, value in inputs.items()
    }


def reference_states(stack: BlockStack, probe: dict[str, Any]) -> list[Tensor]:
    """Return the hidden states at all boundaries of a forward of the whole model, on the CPU."""
    model: Any = stack.model
    record = HiddenStateRecorder(model, stack=stack.path, config=RecordingConfig(device="cpu"))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    stopped = head.register_forward_pre_hook(_stop_forward) if isinstance(head, nn.Module) else None
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


def compare_with_whole_model(
    stack: BlockStack, boundary: int, state: Tensor, reference: Sequence[Tensor], real: Tensor
) -> None:
    """Raise unless the real tokens of a state at a boundary equal those of the whole model."""
    state, expected = state.cpu()[real], reference[boundary][real]
    largest, difference = float(expected.abs().max()), float((state - expected).abs().max())
    if not difference <= sum_order_tolerance(expected.dtype) * largest:
        raise UnsupportedSurgery(
            f"{type(stack.model).__name__} cannot be run block by block: the output state of block {boundary - 1} "
            f"differs from that in the whole model by {difference:.2g}, where the largest value is {largest:.2g}. It "
            "needs more from earlier blocks than the state, or the model changes the state between two blocks. Load "
            "the model into memory.",
            "probe",
        )


def _stop_forward(*_: Any) -> None:
    raise ForwardStopped("The states of all blocks are recorded.")


def check_packing_blockwise(model: nn.Module, batches: Sequence[Batch], *, stack: str | None = None) -> None:
    """Check block by block that a model keeps the documents of packed rows apart.

    `streamline_hooks.data.check_packing` would read all blocks for each document.

    >>> from streamline_hooks.data import packed_batches
    >>> from streamline_hooks.testing import tiny_model
    >>> check_packing_blockwise(tiny_model("llama"), packed_batches([[[5, 6, 7], [8, 9]]], batch_size=1))
    """
    divided = rows_with_most_documents(model, batches)
    if divided is None:
        return
    rows, pieces = divided
    alone = [piece_as_batch(rows, *piece) for piece in pieces]
    try:
        with BlockwisePass(model, [rows, *alone], check=False, stack=stack, desc="packed rows") as states:
            for boundary in states:
                states.drop(boundary - 1)
                whole = states.read(boundary, 0)
                if not boundary:  # a difference in the input of block 0 shows in its output
                    continue
                for number, (row, start, stop) in enumerate(pieces, start=1):
                    check_document(model, boundary - 1, whole[row, start:stop], states.read(boundary, number)[0], start)
    except StreamlineError:
        raise
    except Exception as error:  # raised by a model that does not support positions of packed rows
        raise packed_run_error(model, error) from error
