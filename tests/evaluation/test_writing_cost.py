"""What a training on the model's own text is told to take is what writing it takes, by a clock that tokens move."""

from __future__ import annotations

from typing import Any

import pytest

from streamline_hooks.evaluation import measure_pace
from streamline_hooks.evaluation.writing_cost import writing_cost
from streamline_hooks.repair import DistillationConfig, OnPolicyConfig
from streamline_hooks.repair.rollouts import roll_out
from tests.evaluation.fake_clock import FakeClock
from tests.tiny_models import tiny_model, tokens

BATCHES = [tokens(2, 24, seed=k) for k in range(5)]


@pytest.mark.parametrize(
    ("own", "training"),
    [
        (OnPolicyConfig(share=0.5, prompt=4, shortest=4, longest=8), {}),
        (OnPolicyConfig(share=1.0, begin=0.5, prompt=3, shortest=2, longest=2), {"epochs": 3}),
        (OnPolicyConfig(share=0.5, prompt=4, shortest=4, longest=40), {"gradient_accumulation_steps": 2}),
    ],
)
def test_the_writing_takes_what_it_was_told_to(own: OnPolicyConfig, training: dict[str, Any]) -> None:
    model: Any = tiny_model("llama")
    clock = FakeClock()
    ends = model.generation_config.eos_token_id = list(range(model.config.vocab_size))  # of each text at once
    clock.charge(model.lm_head, 5.0)
    for k, block in enumerate(model.model.layers):
        clock.charge(block.mlp, k + 1.0)
    settings = DistillationConfig(on_policy=own, **training)
    cost = writing_cost(model, BATCHES, settings, measure_pace(model, BATCHES[0], clock=clock), clock=clock)

    assert model.generation_config.eos_token_id is ends, "it is as it was"
    model.generation_config.eos_token_id = None  # no text is shorter than it may be
    steps = round(settings.epochs * -(-len(BATCHES) // settings.gradient_accumulation_steps))
    began, texts = clock(), 0
    for step in range(steps):
        if own.is_due(step, steps):
            for batch in BATCHES[: settings.gradient_accumulation_steps]:
                texts += roll_out(model, batch, prompt=own.prompt, new_tokens=own.longest).counts.texts
    original = texts * (own.prompt + own.longest) * sum(range(1, 7))
    assert texts > 0 and cost.tokens == texts * own.longest
    assert cost.seconds == pytest.approx(clock() - began + original)


def test_the_most_that_is_written_may_be_of_shorter_texts() -> None:
    """A sequence of 30 tokens has three texts of 6 behind 4, and one of 12 or 16."""
    model: Any = tiny_model("llama")
    batches = [tokens(1, 30, seed=k) for k in range(2)]
    pace = measure_pace(model, batches[0])
    for shortest, most in ((6, 18), (16, 16)):
        own = OnPolicyConfig(share=1.0, prompt=4, shortest=shortest, longest=16)
        assert writing_cost(model, batches, DistillationConfig(on_policy=own), pace).tokens == 2 * most
