"""A source of hidden states that has one block of a checkpoint in memory at a time.

All batches run through block k before block k + 1 is read (`BlockwisePass`). States that are needed later are kept in
memory up to a limit, and in files beyond it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

from torch import Tensor, nn

from streamline_hooks.checkpoint.offloaded import (
    PassJournal,
    group_batches,
    offloaded_identity,
    offloaded_weights,
    require_disk_space,
    row_slices,
    state_bytes,
)
from streamline_hooks.checkpoint.streaming import BlockRange, BlockwisePass, StateStorage
from streamline_hooks.core import (
    Batches,
    DistributedStep,
    StreamlineError,
    UnsupportedSurgery,
    current_processes,
    model_digest,
    progress_bar,
    read_file,
    validate_arguments,
    write_file,
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
)
from streamline_hooks.surgery import lm_head_of, outputs_by_token, require_token_by_token, zero_output

_T = TypeVar("_T")
ReadState = Callable[[int], Tensor]
"""Returns the output states of the last block in a variant, given the index of a batch."""


class BlockwiseSource(StateSource):
    """Provide the hidden states of a model whose blocks are on disk.

    All batches run through one block after the other, and a pass reads each block once. Pass the source in place of a
    model to `profile`, `measure_moments`, `measure_branches`, `fit_windows`, `verify_shortlist`, `perplexity` or
    `compress`. Use it in a ``with`` statement.

    Parameters
    ----------
    model : torch.nn.Module
        From `open_checkpoint`, or any other model.
    stack : str, optional
        Path of the stack, see `find_stack`.
    memory : int
        Bytes of hidden states in memory. Further states are in temporary files.
    disk : int, optional
        Maximum bytes of hidden states on disk during a profile, which needs those at all boundaries. The batches are
        divided into groups, and each group reads the blocks once. By default there is one group.
    folder : str or Path, optional
        Folder for all states and the results of finished steps, from which an interrupted run continues when it is
        started again with the same arguments. It is deleted when the ``with`` statement ends without an exception. In a
        distributed run each rank has a sub-folder.
    check : bool
        Whether to compare each block with a forward of the whole model on 32 tokens, which reads the weights once more.

    Raises
    ------
    UnsupportedSurgery
        If the model cannot be run block by block.
    StreamlineError
        If the folder belongs to another run, or the states do not fit on the disk.

    Examples
    --------
    >>> import tempfile, torch
    >>> from streamline_hooks import profile
    >>> from streamline_hooks.checkpoint import open_checkpoint
    >>> from streamline_hooks.testing import tiny_model
    >>> folder = tempfile.mkdtemp()
    >>> tiny_model("llama").save_pretrained(folder)
    >>> with BlockwiseSource(open_checkpoint(folder)) as source:
    ...     measured = profile(source, [torch.arange(3, 43).view(4, 10)])
    >>> measured.num_boundaries, measured.tokens
    (9, 40)
    """

    in_memory = False

    @validate_arguments(memory=0)
    def __init__(
        self,
        model: nn.Module,
        *,
        stack: str | None = None,
        memory: int = 2**31,
        disk: int | None = None,
        folder: str | Path | None = None,
        check: bool = True,
    ) -> None:
        self.model, self._path, self._stack = model, stack, find_stack(model, stack)
        self._memory, self._disk = memory, disk
        self._steps: list[str] = []
        self._is_whole = True  # False for the source of a model inside a surgery
        self._written: set[Path] = set()
        self._folder = None if folder is None else _folder_of_rank(Path(folder))
        self._journal: PassJournal | None = None
        self._checked = 0 if check else len(self._stack)  # number of blocks compared with the whole model

    @property
    def stack(self) -> BlockStack:  # noqa: D102 (see StateSource)
        return self._stack

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._journal is not None and self._folder is not None:
            for path in self._written:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            self._written.clear()
            self._journal.clear()
            if current_processes().count > 1:
                with suppress(OSError):  # it still contains the folder of another rank
                    self._folder.parent.rmdir()

    def identify(self, run: Mapping[str, Any]) -> None:  # noqa: D102
        if self._folder is not None:
            self._journal = PassJournal(self._folder, {**offloaded_identity(self.stack), **run})
            self._checked = max(self._checked, self._journal.boundary or 0)

    def saved_weights(self) -> Iterator[tuple[str, Tensor]]:  # noqa: D102
        return offloaded_weights(self.stack)

    def current(self) -> BlockwiseSource:  # noqa: D102
        source = BlockwiseSource(self.model, stack=self.stack.path, memory=self._memory, disk=self._disk, check=False)
        source._is_whole = False
        source._folder, source._steps, source._written = self._folder, self._steps, self._written
        return source

    def groups(self, batches: Batches, blocks: int) -> list[Sequence[int]]:  # noqa: D102
        if self._disk is None or not batches:
            return [range(len(batches))]
        sizes = [(blocks + 1) * size for size in state_bytes(self.stack, batches)]
        return [*group_batches(sizes, self._disk)]

    @closing_generator
    def boundary_states(self, batches: Batches, blocks: int, desc: str) -> Generator[BoundaryStates, None, None]:  # noqa: D102
        if not batches:
            return
        sizes = [(blocks + 1) * size for size in state_bytes(self.stack, batches)]
        self._require_space(sum(sizes))
        with self._opened(desc, batches, stop=blocks) as states:
            for _ in self._boundaries(states):  # the states at all boundaries stay
                pass
            for number, size in enumerate(sizes):
                real = states.masks[number]
                for rows in row_slices(len(real), size, self._memory):
                    at = [states.entering(boundary, number)[rows] for boundary in range(blocks + 1)]
                    yield BoundaryStates(number, rows, at, real)
            self._finish(states)

    @closing_generator
    def window_sums(  # noqa: D102
        self,
        parts: Sequence[tuple[str, Batches]],
        windows: Sequence[range],
        make: Callable[[int, int], WindowSums],
        *,
        rerun: Sequence[int] | None = None,
    ) -> Generator[tuple[int, list[Any]], None, None]:
        order = sorted(range(len(windows)), key=lambda number: (windows[number].stop, number))
        batches = [batch for _, part in parts for batch in part]
        if not batches:
            for number in order:
                yield number, [None] * len(parts)
            return
        ends = [sum(len(part) for _, part in parts[: k + 1]) for k in range(len(parts))]
        members = [range(end - len(part), end) for end, (_, part) in zip(ends, parts, strict=True)]
        last = max(window.stop for window in windows)
        self._require_space(_peak_boundaries(windows) * sum(state_bytes(self.stack, batches)))
        run = {
            "windows": [[window.start, window.stop] for window in windows],
            "parts": [len(part) for _, part in parts],
            "sums": [_settings(make(number, 1)) for number in range(len(windows))],
        }
        with self._opened(parts[0][0], batches, stop=last, run=run) as states:
            waiting = list(order)
            for boundary in self._boundaries(states):
                while waiting and windows[waiting[0]].stop <= boundary:
                    number = waiting.pop(0)
                    blocks = windows[number][: rerun[number] if rerun else 0]
                    yield number, _window_sums(states, windows[number], members, partial(make, number), number, blocks)
                states.drop_all_except({windows[number].start for number in waiting}, boundary)
            states.drop(last)
            self._finish(states)

    @closing_generator
    def outputs(  # noqa: D102
        self, batches: Batches, variants: Sequence[Variant], desc: str, original: nn.Module | None = None
    ) -> Generator[VariantOutputs, None, None]:
        if original is not None:
            raise StreamlineError(
                "A model that is read block by block was compared with another model. Expected no other model. Leave "
                "original out, or load the model into memory."
            )
        if not batches:
            return
        candidates = {k: variant for k, variant in enumerate(variants) if isinstance(variant, Candidate)}
        own, length = range(len(batches)), len(self.stack)
        passes = 1 + len(variants) - len(candidates)
        self._require_space((3 + 3 * len(candidates) + 2 * (passes - 1)) * sum(state_bytes(self.stack, batches)))
        last: dict[int, ReadState | UnsupportedSurgery] = {}
        with ExitStack() as opened:
            others = [BlockRange(b, variant.window.stop, length) for variant in candidates.values() for b in own]
            described = [
                [variant.window.start, variant.window.stop, type(variant.module).__name__, _digest(variant.module)]
                for variant in candidates.values()
            ]
            options: dict[str, Any] = {"run": {"candidates": described}, "others": others, "share": passes}
            states = opened.enter_context(self._opened(desc, batches, **options))
            for boundary in self._boundaries(states):
                for n, variant in enumerate(candidates.values(), start=1):
                    if variant.window.stop == boundary:
                        for b in own:
                            state = states.entering(variant.window.start, b)
                            states.add(n * len(own) + b, replacement_output(variant.module, state))
                # A continued pass adds the states at its last boundary again.
                starts = {v.window.start for v in candidates.values() if v.window.stop >= boundary}
                states.drop_all_except(starts, boundary)
            for n, k in enumerate(candidates, start=1):
                last[k] = partial(_read_last, states, n * len(own))
            for k, surgery in enumerate(variants):
                if not isinstance(surgery, Candidate):
                    last[k] = self._last_states(opened, surgery, batches, f"{desc} {k + 1}", passes)
            yield from _outputs_by_token(states, [last[k] for k in range(len(variants))], desc)
            self._finish(states)

    def _last_states(
        self, opened: ExitStack, surgery: Callable[[], Any], batches: Batches, desc: str, passes: int
    ) -> ReadState | UnsupportedSurgery:
        """Run all batches through the model after a surgery; return a function that reads the last states."""
        try:
            with surgery():
                source = self.current()
                states = opened.enter_context(source._opened(desc, batches, share=passes))
                for boundary in source._boundaries(states):
                    states.drop_all_except((), boundary)
        except UnsupportedSurgery as error:
            return error
        return partial(_read_last, states, 0)

    def cached(  # noqa: D102
        self,
        name: str,
        make: Callable[[], _T],
        write: Callable[[_T, Path], Any],
        read: Callable[[Path], _T],
        *,
        each_rank: bool = False,
    ) -> _T:
        if self._folder is None:
            return make()
        self._begin()
        folder = self._folder.joinpath(*self._steps)
        file, states = folder / f"{name}.safetensors", folder / name
        work = DistributedStep(name, current_processes())
        if file.is_file() if each_rank else all(work.all_gather_object(file.is_file())):
            result = read(file)
        else:
            self._steps.append(name)
            try:
                result = make()
            finally:
                self._steps.pop()
            folder.mkdir(parents=True, exist_ok=True)
            write(result, file)
        if not self._steps:
            self._written.add(file)
        if states.is_dir():  # deleted after the result was written, so that an interrupted run has one of them
            shutil.rmtree(states)
        return result

    def _opened(
        self,
        desc: str,
        batches: Batches,
        *,
        share: int = 1,
        run: Mapping[str, Any] = MappingProxyType({}),
        stop: int | None = None,
        others: Sequence[BlockRange] = (),
    ) -> BlockwisePass:
        """Return a pass with its own sub-folder, which checks the blocks that no pass has checked yet."""
        folder = None
        self._begin()
        if self._folder is not None:
            folder = self._folder.joinpath(*self._steps, _folder_name(desc))
            if not self._steps:
                self._written.add(folder)
        if not self._is_whole:  # hooks that zero outputs do not change the fingerprint of the weights
            zeroed = [
                path for path, module in self.model.named_modules() if zero_output in module._forward_hooks.values()
            ]
            run = {**run, "zeroed": zeroed}
        stop = len(self.stack) if stop is None else stop
        storage = StateStorage(self._memory // share, folder, run)
        options: dict[str, Any] = {"check": stop > self._checked, "stack": self.stack.path, "desc": desc}
        return BlockwisePass(self.model, batches, stop=stop, storage=storage, others=others, **options)

    def _begin(self) -> None:
        """Open the journal, if `identify` was not called."""
        if self._journal is None and self._is_whole:
            self.identify({})

    def _boundaries(self, states: BlockwisePass) -> Iterator[int]:
        """Yield the boundaries as they are reached, and record afterwards that the blocks were checked."""
        yield from states
        if states.stop > self._checked:
            self._checked = states.stop
            if self._journal is not None:
                self._journal.advance(self._checked)

    def _finish(self, states: BlockwisePass) -> None:
        """Delete the states of a pass, unless the result of the present step is not written yet."""
        if not self._steps:
            states.delete_folder()

    def _require_space(self, size: int) -> None:
        require_disk_space(size, self._memory, self._folder)


def _folder_of_rank(folder: Path) -> Path:
    processes = current_processes()
    return folder if processes.count == 1 else folder / f"rank_{processes.rank}"


def _digest(module: nn.Module | None) -> str:
    return "" if module is None else model_digest(module)


def _folder_name(desc: str) -> str:
    """Return a name for the folder of a pass, short enough for every file system."""
    name = re.sub(r"\W+", "_", desc).strip("_") or "pass"
    return name if len(name) <= 80 else f"{name[:60]}_{hashlib.sha256(desc.encode()).hexdigest()[:12]}"


def _settings(sums: WindowSums) -> list[Any]:
    """Return the class of sums and the options that its state contains, as JSON values."""
    options = {name: value for name, value in sums.state_dict().items() if not isinstance(value, Tensor)}
    return [type(sums).__name__, options]


def _read_last(states: BlockwisePass, first: int, batch: int) -> Tensor:
    return states.read(states.stop, first + batch)


def _peak_boundaries(windows: Sequence[range]) -> int:
    """Return the largest number of boundaries whose states are kept at once.

    These are the two boundaries of the present block and the starts of windows that are not complete.
    """
    last = max(window.stop for window in windows)
    return 2 + max(len({w.start for w in windows if w.start < k < w.stop}) for k in range(last + 1))


def _window_sums(
    states: BlockwisePass,
    window: range,
    members: Sequence[range],
    make: Callable[[int], WindowSums],
    number: int,
    rerun: range,
) -> list[WindowSums | None]:
    """Sum the states around a window for each part of the text, or read the sums of an interrupted run."""
    part_sums: list[WindowSums | None] = []
    with ExitStack() as opened:
        through = None
        for part, batches in enumerate(members):
            file = None if states.folder is None else states.folder / f"sums_{number:04d}_{part}.safetensors"
            if not batches:
                part_sums.append(None)
                continue
            if file is not None and file.is_file():
                tensors, values = read_file(file, "sums over hidden states")
                sums = make(values.pop("features"))
                sums.load_state_dict({**tensors, **values})
                part_sums.append(sums)
                continue
            if rerun and through is None:
                through = opened.enter_context(states.blocks_in_memory(rerun))
            sums = make(states.read(window.start, batches[0]).shape[-1])
            for batch in batches:
                entering = states.entering(window.start, batch)
                if through is not None:
                    through(entering, states.batches[batch])
                sums.update(entering, states.read(window.stop, batch), states.masks[batch])
            part_sums.append(sums)
            if file is not None:
                content = {**sums.state_dict(), "features": states.read(window.start, batches[0]).shape[-1]}
                tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
                write_file(file, tensors, {name: value for name, value in content.items() if name not in tensors})
    return part_sums


def replacement_output(module: nn.Module | None, state: Tensor) -> Tensor:
    """Return the output state of a window's replacement, given its input state."""
    if module is None:
        return state
    with inference(module):
        output: Tensor = module(state)
    return output


def _outputs_by_token(
    states: BlockwisePass, variants: Sequence[ReadState | UnsupportedSurgery], desc: str
) -> Generator[VariantOutputs, None, None]:
    """Yield the logits of a few real tokens of a sequence at a time, and skip sequences of padding."""
    total = sum(int(mask.sum()) for mask in states.masks)
    with lm_head_of(states.stack) as head, progress_bar((1 + len(variants)) * total, desc) as bar:
        is_checked = False
        for number, (batch, mask) in enumerate(zip(states.batches, states.masks, strict=True)):
            state = states.read(states.stop, number)
            if not is_checked and mask.any():
                require_token_by_token(states.stack, head, state[mask])
                is_checked = True
            each = [v if isinstance(v, UnsupportedSurgery) else partial(v, number) for v in variants]
            yield from outputs_by_token(number, batch, mask, state, each, (head, head), bar.update)
