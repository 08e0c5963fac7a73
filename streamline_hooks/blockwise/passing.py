"""Put all sequences through block k before block k + 1 is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from streamline_hooks.arguments import checked
from streamline_hooks.batch import Batch, prepare, real_tokens
from streamline_hooks.blockwise.journal import Journal
from streamline_hooks.blockwise.outside import OutsideBlocks
from streamline_hooks.blockwise.residence import identity_of, resident, stored_bytes
from streamline_hooks.blockwise.states import StateStore
from streamline_hooks.blockwise.truth import probe_of, refuse_known, require_true, true_states
from streamline_hooks.digests import batches_digest
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.hidden_state import read_input, token_mask, write_input
from streamline_hooks.passes import inference, progress, require_finite
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.stack import find_stack
from streamline_hooks.statistics.storage import read_file, write_file
from streamline_hooks.surgery import LayerSurgeon

_TRUTH = "truth.safetensors"


class Journey(NamedTuple):
    """The way of some states through the blocks from `start` to before `stop`.

    Attributes
    ----------
    batch : int
        The batch whose masks and positions the blocks are given with the states.
    start, stop : int
        Boundaries in the stack.
    """

    batch: int
    start: int
    stop: int


class BlockwisePass:
    """All sequences through one block after the other, each block's weights read once.

    Iterating gives the places of the residual stream as the states get there: 0, what enters block 0, then k + 1 once
    all batches have gone through block k. The states at a place stay until `drop`; a pass that needs nothing else
    drops place k when it is at k + 1. Masks, positions and rotary choices are those that the model's own forward makes.

    Parameters
    ----------
    model : torch.nn.Module
        From `open_checkpoint`, or any other.
    batches : sequence of mapping or torch.Tensor
        What the model's forward takes.
    stop : int, optional
        The first block that is not run; by default all are.
    memory : int
        Bytes of states that may be in memory; what is more goes to files that vanish in the end.
    folder : str or Path, optional
        Keep all states in this folder, which is of this pass alone, so that an interrupted pass goes on at the block
        where it was when it is started again with the same arguments.
    check : bool
        Hold every block against a forward of the whole model on 32 tokens. It reads the weights once more.
    run : mapping, optional
        What else must be the same where an interrupted pass goes on, as JSON values.
    ends : sequence of int, optional
        For each batch the first block that it does not go through; by default `stop`.
    others : sequence of Journey
        Further states of the batches, which are put in with `put` once the pass is at their start. They are read and
        dropped as those of a batch, under the numbers that follow the batches', in this order.
    stack : str, optional
        Path of the stack, see `find_stack`.
    what : str
        What the bar says, before what it costs. It counts the bytes of the blocks.

    Attributes
    ----------
    masks : list of torch.Tensor
        The real tokens of each batch, boolean, of shape (batch, tokens), once the first place was reached.

    Raises
    ------
    UnsupportedSurgery
        If a block needs more of those before it than the state; the text says what.
    StreamlineError
        If there is no batch, `stop` is out of range, a state is not finite, or a folder cannot be used.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> model = tiny_model("llama")
    >>> with BlockwisePass(model, [torch.arange(3, 15).view(2, 6)], stop=2) as states:
    ...     for place in states:
    ...         print(place, tuple(states.read(place, 0).shape))
    ...         states.drop(place - 1)
    0 (2, 6, 32)
    1 (2, 6, 32)
    2 (2, 6, 32)
    """

    @checked(stop=0)
    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch | Tensor],
        *,
        stop: int | None = None,
        memory: int = 2**31,
        folder: str | Path | None = None,
        check: bool = True,
        run: Mapping[str, Any] | None = None,
        ends: Sequence[int] | None = None,
        others: Sequence[Journey] = (),
        stack: str | None = None,
        what: str = "block by block",
    ) -> None:
        self.model, self.batches = model, list(batches)
        self.stack = find_stack(model, stack)
        self.stop = len(self.stack) if stop is None else stop
        if self.stop > len(self.stack):
            raise StreamlineError(f"stop={stop} is out of range. Expected at most {len(self.stack)}. Change it.")
        stops = [self.stop] * len(self.batches) if ends is None else ends
        self._journeys = [*(Journey(number, 0, end) for number, end in enumerate(stops)), *others]
        refuse_known(self.stack, self.stop)
        self._folder = None if folder is None else Path(folder)
        self._check, self._what = check, what
        self._store = StateStore(memory, self._folder)
        self._journal: Journal | None = None
        if self._folder is not None:
            about = {**identity_of(self.stack), "batches": batches_digest(self.batches), "stop": self.stop}
            ways = {} if ends is None and not others else {"ways": [[*way] for way in self._journeys]}
            self._journal = Journal(self._folder, {**about, "check": check, **ways, **(run or {})})
        self.masks: list[Tensor] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[int]:
        reached = self._journal.place if self._journal else None
        outside = OutsideBlocks(self.stack)
        probe = probe_of(self.batches[0])
        truth = self._truth(probe) if self._check else []
        outside.restore()
        self._enter(write=reached is None)
        outside.restore()
        if reached is None:
            reached = self.advance(0)
        made = truth[reached] if truth else None
        real = token_mask(truth[0], real_tokens(probe)).cpu() if truth else torch.empty(0)
        costs = [stored_bytes(block) for block in self.stack.blocks[: self.stop]]
        cost = f"{self._what}: {self.stop} of {len(self.stack)} blocks, each read once"
        with progress(sum(costs), cost, "B", sum(costs[:reached])) as bar:
            yield reached
            for k in range(reached, self.stop):
                with self._at(k) as through:
                    if made is not None:
                        made = self._first_through(k, through, made, probe)
                        require_true(self.stack, k + 1, made, truth, real)
                        outside.restore()
                    going = [number for number, way in enumerate(self._journeys) if way.start <= k < way.stop]
                    for done, number in enumerate(going):
                        state = through(self._store.read(k, number), self.batches[self._journeys[number].batch])
                        if number < len(self.batches):
                            require_finite(state, self.masks[number], f"leaves block {k}", number)
                        self._store.keep(k + 1, number, state)
                        bar.update(costs[k] * (done + 1) // len(going) - costs[k] * done // len(going))
                outside.restore()
                yield self.advance(k + 1)

    def read(self, place: int, batch: int) -> Tensor:
        """The states of a batch at a place, of shape (batch, tokens, features), not to be changed."""
        return self._store.read(place, batch)

    def put(self, number: int, state: Tensor) -> None:
        """Put in states that go through the blocks from here on beside the batches', under their number.

        A pass that goes on at a later place finds them there. Values that are not finite are carried along.

        Parameters
        ----------
        number : int
            That of one of `others`, which begins at the place that the pass is at.
        state : torch.Tensor
            Of the shape of its batch, (batch, tokens, features).
        """
        self._store.keep(self._journeys[number].start, number, state)

    def drop(self, place: int) -> None:
        """Forget the states at a place; the last one that was reached has to stay."""
        self._store.drop(place)

    def done(self) -> None:
        """Take away the folder: what was wanted of the states is safe."""
        if self._journal is not None:
            self._journal.clear()

    def _truth(self, probe: dict[str, Any]) -> list[Tensor]:
        file = None if self._folder is None else self._folder / _TRUTH
        if file is not None and file.is_file():
            kept, _ = read_file(file, "states of the whole model")
            return [kept[str(place)] for place in range(len(kept))]
        truth = true_states(self.stack, probe)
        if file is not None:
            write_file(file, {str(place): state for place, state in enumerate(truth)}, {})
        return truth

    def _enter(self, write: bool) -> None:
        """What enters block 0, and which of its tokens are real."""
        record = HiddenStateRecorder(self.model, [0], outputs=False, stop=True, stack=self.stack.path)
        self.masks = []
        with inference(self.model), record:
            for number, batch in enumerate(self.batches):
                record.clear()
                given = prepare(self.model, batch)
                record(**given)
                state = record.inputs[0][0]
                self.masks.append(token_mask(state, real_tokens(given)).cpu())
                if write:
                    require_finite(state, self.masks[number], "enters block 0", number)
                    self._store.keep(0, number, state)

    @contextmanager
    def _at(self, k: int) -> Iterator[Any]:
        """Block k in memory and in first place, and how a state goes through it."""
        block = self.stack[k]
        entering: list[Tensor] = []

        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            made = read_input(args, kwargs, block)
            given = entering[0].to(device=made.device, dtype=made.dtype, copy=True)
            return write_input(args, kwargs, given, block)

        with resident(block), LayerSurgeon(self.model, self.stack.path, probe=False) as surgeon:
            if k:
                surgeon.remove(range(k))
            record = HiddenStateRecorder(self.model, [0], inputs=False, stop=True, stack=self.stack.path)
            handle = block.register_forward_pre_hook(enter, with_kwargs=True)

            def through(state: Tensor, batch: Batch | Tensor) -> Tensor:
                entering[:] = [state]
                record.clear()
                record(**prepare(self.model, batch))
                return record.outputs[0][0]

            try:
                with inference(self.model), record:
                    yield through
            finally:
                handle.remove()
                entering.clear()

    def _first_through(self, k: int, through: Any, state: Tensor, probe: dict[str, Any]) -> Tensor:
        try:
            return through(state, probe)  # type: ignore[no-any-return]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise UnsupportedSurgery(
                f"{type(self.model).__name__} cannot be run block by block: without the blocks before it, block {k} "
                f"fails ({type(error).__name__}: {error}). Load it into memory.",
                "not-run",
            ) from error

    def advance(self, place: int) -> int:
        """Note that a boundary was reached, and return it."""
        if self._journal is not None:
            self._journal.advance(place)
        return place
