"""How many of a user's own questions are still answered right without a window. A higher score goes sooner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from streamline_hooks.digests import texts_digest, tokenizer_digest
from streamline_hooks.evaluation.choices import score_choices
from streamline_hooks.evaluation.continuations import NotFiniteLikelihood
from streamline_hooks.evaluation.keys import texts_of
from streamline_hooks.evaluation.questions import Question, read_questions
from streamline_hooks.selection.criteria.criterion import Criterion
from streamline_hooks.surgery import LayerSurgeon


def accuracy_drop(
    questions: str | Path | Sequence[Question],
    tokenizer: Any,
    *,
    normalised: bool = False,
    batch_size: int = 16,
    add_bos: bool = False,
) -> Criterion:
    """Make a criterion of questions with several choices.

    Its score is the accuracy without a window minus that of the whole model: minus the drop. Every window costs all
    questions once, without the window's blocks. It reads no batches; give `score_windows` an empty list of them.

    Parameters
    ----------
    questions : str, Path or sequence of Question
        A JSONL file, see `read_questions`, or what was read from one. Not the questions that will be reported on.
    tokenizer : PreTrainedTokenizerBase
    normalised : bool
        Take the accuracy of the likelihoods a character.
    batch_size : int
        Choices at a time.
    add_bos : bool
        See `score_choices`.

    Returns
    -------
    Criterion
        With −inf for a window without which the likelihoods are not finite. To have it by name:
        ``register_criterion(replace(accuracy_drop(...), name="mine"))``.

    Raises
    ------
    StreamlineError
        If the file cannot be read; when scoring, if a question cannot be scored, or a window cannot be removed.
    """
    asked = read_questions(questions) if isinstance(questions, (str, Path)) else list(questions)

    def accuracy(model: nn.Module, what: str) -> float:
        found = score_choices(model, tokenizer, asked, batch_size=batch_size, add_bos=add_bos, what=what)
        return found.normalised_accuracy if normalised else found.accuracy

    def score(model: nn.Module, batches: Any, windows: Sequence[range], *, stack: str | None = None) -> list[float]:
        whole, scores = accuracy(model, "questions to the whole model"), []
        for number, window in enumerate(windows, start=1):
            with LayerSurgeon(model, stack) as surgeon:
                surgeon.remove(window)
                try:
                    scores.append(accuracy(model, f"questions without window {number} of {len(windows)}") - whole)
                except NotFiniteLikelihood:
                    scores.append(-math.inf)
        return scores

    def made_of() -> str:
        read = [text for question in asked for text in texts_of(question)]
        return texts_digest([*map(repr, (asked, normalised, add_bos)), tokenizer_digest(tokenizer, read)])

    return Criterion("accuracy", score, "model", made_of=made_of)
