"""What the steps of a training on the model's own text cost besides, told before it is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from streamline_hooks.batch import Batch, device_of
from streamline_hooks.evaluation.cost import Cost, Pace
from streamline_hooks.evaluation.speed import wait_for
from streamline_hooks.generation import seeded, written_on
from streamline_hooks.repair.course import Course
from streamline_hooks.repair.distillation_config import DistillationConfig
from streamline_hooks.repair.on_policy import OnPolicyConfig
from streamline_hooks.repair.rollouts import prompts_of

_TIMED = 4  # tokens written, beyond the first, which runs the prompt


def writing_cost(
    model: nn.Module,
    batches: Sequence[Batch | Tensor],
    distillation: DistillationConfig,
    pace: Pace,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Of writing all texts as long as they may become, and of what the original says of them.

    The steps themselves take the place of others, and count there. A few tokens are written here, by the model as it
    is, though what will write is smaller, and with no text at its end.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    batches : sequence of mapping or torch.Tensor
        Those that will be trained on.
    distillation : DistillationConfig
        With `DistillationConfig.on_policy`.
    pace : Pace
        Of the model.
    clock : callable
        Returns seconds.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.evaluation import measure_pace
    >>> from streamline_hooks.repair import OnPolicyConfig
    >>> from streamline_hooks.testing import tiny_model
    >>> model, text = tiny_model("llama"), [torch.arange(3, 51).view(1, 48)] * 8
    >>> own = DistillationConfig(on_policy=OnPolicyConfig(share=0.5, prompt=4, shortest=4, longest=20))
    >>> cost = writing_cost(model, text, own, measure_pace(model, text[0]))
    >>> print(cost.what, cost.tokens)  # 4 steps, of 2 texts of 20 tokens
    write own text, at most 160
    """
    own = cast(OnPolicyConfig, distillation.on_policy)
    steps = Course(distillation, len(batches)).steps
    due = sum(own.is_due(step, steps) for step in range(steps)) * distillation.gradient_accumulation_steps
    lengths = own.lengths
    most = {length: max((prompts_of(batch, own.prompt, length) for batch in batches), key=len) for length in lengths}
    prompts = most[own.longest]

    def seconds(new_tokens: int) -> float:
        wait_for(model)
        began = clock()
        with _endless(model), seeded(device_of(model), "writing cost"):
            written_on(model, None, prompts, new_tokens=new_tokens, sampling=own.sampling)
        wait_for(model)
        return clock() - began

    seconds(1)  # whatever is set up at a first time
    first = seconds(1)
    each = max(0.0, seconds(1 + _TIMED) - first) / _TIMED
    places = max(sum(map(len, given)) + len(given) * length for length, given in most.items())
    taught = places * (pace.before + sum(pace.blocks))
    kept = 2 * places * len(pace.blocks) * pace.features * pace.state_size  # keys and values, at the most
    return Cost(
        "write own text, at most",
        due * max(len(given) * length for length, given in most.items()),
        due * (first + each * (own.longest - 1) + taught),
        kept,
    )


@contextmanager
def _endless(model: nn.Module) -> Iterator[None]:
    """Let no token end a text."""
    configured: Any = model.generation_config
    ends, configured.eos_token_id = configured.eos_token_id, None
    try:
        yield
    finally:
        configured.eos_token_id = ends
