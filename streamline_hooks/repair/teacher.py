"""Teacher outputs and student inputs, computed once for every batch and cached in memory or in files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from streamline_hooks.batch import Batch
from streamline_hooks.core.hardware_config import HardwareConfig
from streamline_hooks.core.out_of_memory import halve_rows
from streamline_hooks.distributed import sequences_of, some_of
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.passes import recorded
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.repair.student import Student
from streamline_hooks.stack import find_stack
from streamline_hooks.wrapping import is_sharded


@dataclass(frozen=True)
class Taught:
    """Cached states of one batch, of shape (batch, tokens, features), on the CPU.

    `entrance` enters the first changed block, `after` leaves each window, `exit` leaves the last block before the
    final norm. `mask` marks real tokens; None if all are.
    """

    entrance: Tensor
    after: tuple[Tensor, ...] = ()
    exit: Tensor | None = None
    mask: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """The mask, also if all tokens are real."""
        return torch.ones(self.entrance.shape[:2], dtype=torch.bool) if self.mask is None else self.mask

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return self.entrance.shape[:2].numel() if self.mask is None else int(self.mask.sum())

    def rows(self, rows: slice) -> Taught:
        """Return some of the sequences."""
        return Taught(
            self.entrance[rows],
            tuple(state[rows] for state in self.after),
            None if self.exit is None else self.exit[rows],
            None if self.mask is None else self.mask[rows],
        )


@dataclass(frozen=True)
class TaughtStates:
    """Cached states of all batches.

    `start` is the first changed block, None if the entrance is what leaves the model; `after` the windows whose
    outputs are cached; `exits` whether the outputs of the last block are.
    """

    start: int | None
    after: tuple[range, ...]
    exits: bool
    batches: list[Taught]


@contextmanager
def taught_states(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    start: int | None,
    *,
    after: Sequence[range] = (),
    exits: bool = True,
    stack: str | None = None,
    dtype: torch.dtype | None = None,
    memory: int = 2**31,
    folder: str | Path | None = None,
    what: str = "original",
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[TaughtStates]:
    """Cache the states of every batch in one forward, no further than needed.

    `memory` is in bytes; what exceeds it goes to temporary files in `folder`. `dtype` is that of the cache, by default
    that of the model. `say` is told if fewer sequences fit into device memory.
    """
    found = find_stack(model, stack)
    ends = [window.stop - 1 for window in after] + ([len(found) - 1] if exits else [])
    cost = f"{what}: {max(ends) + 1 if ends else start} of {len(found)} blocks"
    rows = max(map(sequences_of, batches), default=1)
    with ExitStack() as opened:

        def run(rows: int) -> list[Taught]:
            with ExitStack() as attempt:
                room = attempt.enter_context(StateMemory(memory, folder))
                states = _run(model, batches, start, ends, exits, found.path, dtype, cost, room, rows)
                opened.enter_context(attempt.pop_all())
            return states

        (kept,) = halve_rows(run, rows, say, splits=not is_sharded(model))
        yield TaughtStates(start, tuple(after), exits, kept)
        kept.clear()


def _run(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    start: int | None,
    ends: list[int],
    exits: bool,
    stack: str,
    dtype: torch.dtype | None,
    cost: str,
    room: StateMemory,
    rows: int,
) -> list[Taught]:
    """Cache the states of every batch, `rows` sequences at a time."""
    options = {"detach": True, "device": "cpu", "dtype": dtype, "stack": stack}
    entering = (
        None if start is None else HiddenStateRecorder(model, [start], outputs=False, stop=not ends, **options)  # type: ignore[arg-type]
    )
    leaving = HiddenStateRecorder(model, ends, inputs=False, stop=True, **options) if ends else None  # type: ignore[arg-type]
    counts = [range(0, sequences_of(batch), rows) for batch in batches]
    parts = [some_of(b, slice(k, k + rows)) for b, starts in zip(batches, counts, strict=True) for k in starts]
    with ExitStack() as opened:
        if leaving is not None and entering is not None:
            opened.enter_context(entering)
        last = cast(HiddenStateRecorder, leaving or entering)
        passed = opened.enter_context(recorded(model, parts, last, cost))
        kept = []
        for starts in counts:
            pieces, masks = [], []
            for _ in starts:
                _, mask, _ = next(passed)
                masks.append(mask.cpu())
                pieces.append([leaving.outputs[k][0] for k in ends] if leaving is not None else [])
                if entering is not None:
                    pieces[-1].insert(0, *(state for (state,) in entering.inputs.values()))
                    entering.clear()
            if pieces[0][0].ndim != 3:
                raise UnsupportedSurgery(
                    f"The states of {stack} have the shape {tuple(pieces[0][0].shape)}, all images in one row, so "
                    "that they are not told apart in a training. Repair this stack in closed form (fit_windows).",
                    "layout",
                )
            states = [room.keep(torch.cat(s) if len(s) > 1 else s[0]) for s in zip(*pieces, strict=True)]
            entrance = states[-1] if start is None else states.pop(0)
            left = states.pop() if exits else None
            real = torch.cat(masks)
            kept.append(Taught(entrance, tuple(states), left, None if bool(real.all()) else real))
        next(passed, None)  # its bar comes to its end
    return kept


class StateMemory:
    """Tensors in memory as long as they fit, and then in files."""

    def __init__(self, memory: int, folder: str | Path | None) -> None:
        self._left, self._folder = memory, folder
        self._files: list[tempfile._TemporaryFileWrapper[bytes]] = []

    def __enter__(self) -> StateMemory:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def keep(self, state: Tensor) -> Tensor:
        """Keep a tensor in memory, or in a file once memory is used up."""
        size = state.numel() * state.element_size()
        if size <= self._left:
            self._left -= size
            return state
        self._left = 0
        try:
            file = tempfile.NamedTemporaryFile(suffix=".states", dir=self._folder)  # noqa: SIM115
            self._files.append(file)
            _reserve(file.fileno(), size)
            mapped = torch.from_file(file.name, shared=True, size=state.numel(), dtype=state.dtype)
            return mapped.copy_(state.flatten()).view(state.shape)
        except (OSError, RuntimeError) as error:
            raise StreamlineError(
                "The original's states do not fit into the memory allowed for them, and a file for the rest cannot be "
                f"written ({error}). Allow more memory, keep them as bfloat16, or name a folder with room."
            ) from error


def _reserve(file: int, size: int) -> None:
    """Allocate the file now: on a full disk, writing to the mapping would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # not on macOS
        os.ftruncate(file, size)


@contextmanager
def taught_to(
    student: Student,
    batches: Sequence[Batch | Tensor],
    hardware: HardwareConfig,
    *,
    after: tuple[range, ...] = (),
    exits: bool = True,
    what: str = "original",
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[TaughtStates]:
    """Cache the states of every batch for a student, and the exits of its teacher if that is another model."""
    shared: dict[str, Any] = {"dtype": hardware.kept_dtype, "memory": hardware.state_memory, "say": say}
    own: dict[str, Any] = {**shared, "stack": student.stack.path}
    other_teacher = student.teacher is not student.model
    if other_teacher and after:
        raise StreamlineError(
            f"The loss compares states after windows, and the teacher is another model "
            f"({len(student.teacher_stack)} blocks against {len(student.stack)}), which has no such windows. Compare "
            "what is said: kl, reverse_kl or lm."
        )
    if not (other_teacher and exits):
        with taught_states(student.model, batches, student.start, after=after, exits=exits, what=what, **own) as states:
            yield states
        return
    half = {"memory": hardware.state_memory // 2}  # of one model the entrances, of the other what leaves it
    path = student.teacher_stack.path
    own, other = {**own, **half, "what": f"{what}, entrance"}, {**shared, **half, "stack": path, "what": what}
    with (
        taught_states(student.model, batches, student.start, exits=False, **own) as entrances,
        taught_states(student.teacher, batches, None, **other) as answers,
    ):
        pairs = zip(entrances.batches, answers.batches, strict=True)
        yield replace(answers, start=student.start, batches=[replace(a, exit=b.exit) for a, b in pairs])
