"""Trainings of a tiny repair, each of which one process and several do; what each of them came to."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamline_hooks.core import current_processes
from streamline_hooks.distillation.config import DistillationConfig
from streamline_hooks.distillation.healing import HealingConfig, student_of
from streamline_hooks.distillation.losses import Objective
from streamline_hooks.distillation.student import Student
from streamline_hooks.distillation.teacher_cache import cache_teacher_states
from streamline_hooks.distillation.train import train
from streamline_hooks.replacements import LinearReplacement
from tests.logs import logged
from tests.tiny_models import left_padded, tiny_model

BATCHES = [left_padded(rows, 9 + rows, seed=rows) for rows in (3, 1, 4, 2)]
VALIDATION = [left_padded(3, 9, seed=9), left_padded(1, 8, seed=10)]
SETTINGS = DistillationConfig(
    {"kl": 1.0, "lm": 0.01, "relative": 1.0},
    learning_rate=1e-2,
    gradient_accumulation_steps=2,
    epochs=2,
    validations=2,
    warmup_ratio=0.0,
)
BEST = range(1, 3)


def student(dropout: float = 0.0, seed: int = 0) -> Student:
    torch.manual_seed(seed)
    module = LinearReplacement(32)
    nn.init.normal_(module.projection.weight, std=0.05)
    if dropout:
        module.projection = nn.Sequential(nn.Dropout(dropout), module.projection)
    return Student(tiny_model("llama"), [(BEST, module)])


def outcome(settings: DistillationConfig = SETTINGS, made: Student | None = None, **options: Any) -> dict[str, Any]:
    """How a training went, or what it raised."""
    made = made or student()
    try:
        with logged() as said:
            trained = train(made, BATCHES, VALIDATION, settings, **options)
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    return {
        "weights": [p.detach().clone() for p in made.parameters().values()],
        "kl": torch.tensor([row["distance"] for row in trained.history], dtype=torch.float64),
        "loss": torch.tensor([row["loss"] or 0.0 for row in trained.history], dtype=torch.float64),
        "steps": (trained.steps, trained.tokens, trained.best_step, trained.stopped),
        "said": said,
        "seconds": trained.seconds,
    }


@contextmanager
def in_loss(call: int, does: Callable[[torch.Tensor], torch.Tensor], rank: int | None = None) -> Iterator[None]:
    """Let something happen at a call of the loss, in one process or in all."""
    make, calls = Objective.output_loss, [0]

    def changed(self: Any, *given: Any) -> torch.Tensor:
        calls[0] += 1
        loss = make(self, *given)
        return does(loss) if calls[0] == call and rank in (None, current_processes().rank) else loss

    Objective.output_loss = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Objective.output_loss = make  # type: ignore[method-assign]


def interrupted(loss: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGINT)
    return loss


def fails(loss: torch.Tensor) -> torch.Tensor:
    raise KeyError("no such thing")


def out_of_memory(loss: torch.Tensor) -> torch.Tensor:
    raise torch.cuda.OutOfMemoryError("planted")


@contextmanager
def few_tokens_at_a_time() -> Iterator[None]:
    """Compute the logits of 5 tokens at a time, with their gradients."""
    token_outputs: Any = sys.modules["streamline_hooks.surgery.token_outputs"]
    before = token_outputs.WHOLE_LOGIT_BYTES, token_outputs.LOGIT_BYTES
    token_outputs.WHOLE_LOGIT_BYTES, token_outputs.LOGIT_BYTES = 0, 4 * 64 * 5
    try:
        yield
    finally:
        token_outputs.WHOLE_LOGIT_BYTES, token_outputs.LOGIT_BYTES = before


def with_head() -> Student:
    """Return a student that trains the last block and the LM head too."""
    made = student()
    return student_of(made.stack, made.replacement_modules, HealingConfig("partial", "last", 1, head=True))


def trainings(folder: Path) -> dict[str, Any]:
    """What one process and several are to do alike."""
    found = {"whole": outcome(), "head": outcome(made=with_head())}
    with few_tokens_at_a_time():
        found |= {"whole, by token": outcome(), "head, by token": outcome(made=with_head())}
    made = student()
    with cache_teacher_states(made.model, BATCHES, 1, after=[BEST]) as states:
        made.teacher_cache = states
        found["taught"] = outcome(made=made)
    found["patience"] = outcome(replace(SETTINGS, learning_rate=3.0, patience=1, validations=4))
    return found


def in_several(folder: Path, rank: int) -> dict[str, Any]:
    """What is looked at where there are several processes, one of which is not like the others."""
    mine = folder / "training" if rank == 0 else folder / "training" / "nowhere"  # a file is no folder
    kept = replace(SETTINGS, checkpoint_minutes=0.0)
    found = trainings(folder)
    with in_loss(3, interrupted, rank=1):
        found["interrupted"] = outcome(kept, checkpoint_file=mine)
    found["its file"] = sorted(path.name for path in folder.iterdir() if path.name.startswith("training"))
    found["gone on"] = outcome(kept, resume=True, checkpoint_file=mine)
    found["of one, gone on"] = outcome(kept, resume=True, checkpoint_file=folder / "one")
    dropped = kept
    found["dropout"] = outcome(dropped, student(0.2))
    with in_loss(3, interrupted, rank=0):
        outcome(dropped, student(0.2), checkpoint_file=folder / "dropped")
    found["dropout, gone on"] = outcome(dropped, student(0.2), resume=True, checkpoint_file=folder / "dropped")
    with in_loss(3, lambda loss: loss * float("nan"), rank=1):
        found["nan"] = outcome()
    with in_loss(2, out_of_memory, rank=1):
        found["memory"] = outcome()
    with few_tokens_at_a_time(), in_loss(2, out_of_memory, rank=1):
        found["memory, by token"] = outcome(made=with_head())
    with in_loss(2, fails, rank=1):
        found["failed"] = outcome()
    found["other settings"] = outcome(replace(SETTINGS, seed=rank))
    found["other start"] = outcome(made=student(seed=rank))
    apart = student()
    with in_loss(3, lambda loss: (next(iter(apart.parameters().values())).data.add_(0.1), loss)[1], rank=1):
        found["apart"] = outcome(made=apart)
    found["no folder"] = outcome(kept, checkpoint_file=folder / "training" / "nowhere")
    return found
