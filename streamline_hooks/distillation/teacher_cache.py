"""Cache of teacher outputs and student inputs, computed once per batch and kept in memory or in files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from streamline_hooks.core import (
    Batch,
    HardwareConfig,
    StreamlineError,
    UnsupportedSurgery,
    batch_rows,
    batches_digest,
    is_sharded,
    retry_with_fewer_rows,
    select_rows,
)
from streamline_hooks.distillation.student import Student
from streamline_hooks.modeling import find_stack
from streamline_hooks.recording import HiddenStateRecorder, RecordingConfig


@dataclass(frozen=True)
class TeacherStates:
    """Cached states of one batch, of shape (batch, tokens, features), on the CPU.

    Attributes
    ----------
    entrance : torch.Tensor
        Input of the student's first changed block.
    after : tuple of torch.Tensor
        Teacher's state after each window.
    exit : torch.Tensor or None
        Teacher's output of the last block, before the final norm.
    mask : torch.Tensor or None
        Mask of real tokens, (batch, tokens); None if all tokens are real.

    Examples
    --------
    >>> states = TeacherStates(torch.zeros(2, 5, 8))
    >>> states.tokens, states.rows(slice(0, 1)).entrance.shape
    (10, torch.Size([1, 5, 8]))
    """

    entrance: Tensor
    after: tuple[Tensor, ...] = ()
    exit: Tensor | None = None
    mask: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """The mask of real tokens, all True if `mask` is None."""
        return torch.ones(self.entrance.shape[:2], dtype=torch.bool) if self.mask is None else self.mask

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return self.entrance.shape[:2].numel() if self.mask is None else int(self.mask.sum())

    def rows(self, rows: slice) -> TeacherStates:
        """Return the states of some of the sequences."""
        return TeacherStates(
            self.entrance[rows],
            tuple(state[rows] for state in self.after),
            None if self.exit is None else self.exit[rows],
            None if self.mask is None else self.mask[rows],
        )


@dataclass(frozen=True)
class TeacherCache:
    """Cached states of all batches.

    Attributes
    ----------
    start : int or None
        The student's first changed block; None if the entrance is the output of the last block.
    after : tuple of range
        Windows whose outputs are cached.
    exits : bool
        Whether the outputs of the last block are cached.
    batches : list of TeacherStates
        The states of each batch.
    data : str
        Digest of the batches; "" if unknown.
    blocks : tuple of torch.nn.Module
        The blocks of the model that computed the exits, or else the entrances; empty if unknown.

    Examples
    --------
    >>> TeacherCache(2, (range(2, 4),), True, [TeacherStates(torch.zeros(2, 5, 8))]).start
    2
    """

    start: int | None
    after: tuple[range, ...]
    exits: bool
    batches: list[TeacherStates]
    data: str = ""
    blocks: tuple[nn.Module, ...] = ()


@contextmanager
def cache_teacher_states(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    start: int | None,
    *,
    after: Sequence[range] = (),
    exits: bool = True,
    stack: str | None = None,
    hardware: HardwareConfig | None = None,
    desc: str = "original",
) -> Iterator[TeacherCache]:
    """Cache hidden states of every batch in one forward pass that ends after the last block needed.

    The cache takes at most ``hardware.state_memory`` bytes of memory and temporary files for the rest, until the
    context ends. Its dtype is ``hardware.state_dtype``, by default that of the model. If a batch does not fit into
    device memory, fewer sequences are run at a time.

    Parameters
    ----------
    model : torch.nn.Module
    batches : sequence of mapping or torch.Tensor
    start : int or None
        First block that a student changes; its input is cached. None caches the output of the last block instead.
    after : sequence of range
        Windows whose outputs are cached.
    exits : bool
        Whether to cache the outputs of the last block; default True.
    stack : str, optional
        Path of the block stack, see `find_stack`.
    hardware : HardwareConfig, optional
    desc : str
        Text of the progress bar.

    Yields
    ------
    TeacherCache

    Raises
    ------
    UnsupportedSurgery
        If the hidden states do not have the shape (batch, tokens, features).
    StreamlineError
        If a temporary file cannot be written.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> batches = [torch.arange(3, 23).view(2, 10)]
    >>> with cache_teacher_states(tiny_model("llama"), batches, 2, after=[range(2, 4)]) as cache:
    ...     cache.batches[0].entrance.shape, len(cache.batches[0].after)
    (torch.Size([2, 10, 32]), 1)
    """
    hardware_config, block_stack = hardware or HardwareConfig(), find_stack(model, stack)
    ends = [window.stop - 1 for window in after] + ([len(block_stack) - 1] if exits else [])
    bar_text = f"{desc}: {max(ends) + 1 if ends else start} of {len(block_stack)} blocks"
    rows = max(map(batch_rows, batches), default=1)
    with ExitStack() as opened:

        def run(rows: int) -> list[TeacherStates]:
            with ExitStack() as attempt:
                store = attempt.enter_context(TeacherStateStore(hardware_config.state_memory))
                states = _run(
                    model,
                    batches,
                    start,
                    ends,
                    exits,
                    block_stack.path,
                    hardware_config.kept_dtype,
                    bar_text,
                    store,
                    rows,
                )
                opened.enter_context(attempt.pop_all())
            return states

        (batch_states,) = retry_with_fewer_rows(run, rows, splits=not is_sharded(model))
        yield TeacherCache(start, tuple(after), exits, batch_states, batches_digest(batches), block_stack.blocks)
        batch_states.clear()


def _run(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    start: int | None,
    ends: list[int],
    exits: bool,
    stack: str,
    dtype: torch.dtype | None,
    bar_text: str,
    store: TeacherStateStore,
    rows: int,
) -> list[TeacherStates]:
    """Record the states of every batch, `rows` sequences at a time."""
    record = partial(HiddenStateRecorder, model, config=RecordingConfig(device="cpu", dtype=dtype), stack=stack)
    entering = None if start is None else record([start], sites=["block.input"], stop=not ends)
    leaving = record(ends, sites=["block.output"], stop=True) if ends else None
    counts = [range(0, batch_rows(batch), rows) for batch in batches]
    parts = [select_rows(b, slice(k, k + rows)) for b, starts in zip(batches, counts, strict=True) for k in starts]
    with ExitStack() as opened:
        if leaving is not None and entering is not None:
            opened.enter_context(entering)
        last = cast(HiddenStateRecorder, leaving or entering)
        runs = opened.enter_context(last.over(parts, bar_text))
        batch_states = []
        for starts in counts:
            pieces, masks = [], []
            for _ in starts:
                masks.append(next(runs).real.cpu())
                pieces.append([leaving.outputs[k][0] for k in ends] if leaving is not None else [])
                if entering is not None:
                    pieces[-1].insert(0, *(state for (state,) in entering.inputs.values()))
                    entering.clear()
            if pieces[0][0].ndim != 3:
                raise UnsupportedSurgery(
                    f"The states of {stack} have the shape {tuple(pieces[0][0].shape)}, all images in one row. "
                    "Expected (batch, tokens, features) for training. Repair this stack with fit_windows.",
                    "layout",
                )
            states = [store.keep(torch.cat(s) if len(s) > 1 else s[0]) for s in zip(*pieces, strict=True)]
            entrance = states[-1] if start is None else states.pop(0)
            exit_states = states.pop() if exits else None
            real = torch.cat(masks)
            batch_states.append(TeacherStates(entrance, tuple(states), exit_states, None if bool(real.all()) else real))
        next(runs, None)  # complete the progress bar
    return batch_states


class TeacherStateStore(ExitStack):
    """Store tensors in memory up to a limit, and further ones in temporary files until the store is closed."""

    def __init__(self, memory: int) -> None:
        super().__init__()
        self._left = memory

    def keep(self, state: Tensor) -> Tensor:
        """Store a tensor in memory, or in a file if the limit is reached."""
        size = state.numel() * state.element_size()
        if size <= self._left:
            self._left -= size
            return state
        self._left = 0
        try:
            file = self.enter_context(tempfile.NamedTemporaryFile(suffix=".states"))  # noqa: SIM115
            if hasattr(os, "posix_fallocate"):  # without it, a full disk would kill the process
                os.posix_fallocate(file.fileno(), 0, size)
            else:  # on macOS
                os.ftruncate(file.fileno(), size)
            mapped = torch.from_file(file.name, shared=True, size=state.numel(), dtype=state.dtype)
            return mapped.copy_(state.flatten()).view(state.shape)
        except (OSError, RuntimeError) as error:
            raise StreamlineError(
                "The teacher's states exceed HardwareConfig.state_memory, and a temporary file cannot be written "
                f"({error}). Increase state_memory, set state_dtype='bfloat16', or set TMPDIR to a folder with more "
                "space."
            ) from error


@contextmanager
def cache_for_student(
    student: Student,
    batches: Sequence[Batch | Tensor],
    hardware: HardwareConfig,
    *,
    after: tuple[range, ...] = (),
    exits: bool = True,
    desc: str = "original",
) -> Iterator[TeacherCache]:
    """Cache the states of every batch for a student, with the exits of its teacher if that is another model."""
    options: dict[str, Any] = {"hardware": hardware, "stack": student.stack.path}
    other_teacher = student.teacher is not student.model
    if other_teacher and after:
        raise StreamlineError(
            f"The loss compares hidden states after windows, but the teacher is another model with "
            f"{len(student.teacher_stack)} blocks instead of {len(student.stack)}. Expected a loss on outputs. Use kl, "
            "reverse_kl or lm."
        )
    if not (other_teacher and exits):
        with cache_teacher_states(
            student.model, batches, student.start, after=after, exits=exits, desc=desc, **options
        ) as states:
            yield states
        return
    # Half of the memory is for the entrances of the student, half for the exits of the teacher.
    half, path = replace(hardware, state_memory=hardware.state_memory // 2), student.teacher_stack.path
    options = {**options, "hardware": half, "desc": f"{desc}, entrance"}
    other: dict[str, Any] = {"hardware": half, "stack": path, "desc": desc}
    with (
        cache_teacher_states(student.model, batches, student.start, exits=False, **options) as entrances,
        cache_teacher_states(student.teacher, batches, None, **other) as answers,
    ):
        pairs = zip(entrances.batches, answers.batches, strict=True)
        yield replace(answers, start=student.start, batches=[replace(a, exit=b.exit) for a, b in pairs])
