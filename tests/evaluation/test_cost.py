"""What a pass is told to take is what it takes, by a clock that each part of the model moves by a known time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import HiddenStateRecorder, Selection, StreamlineError, find_stack, perplexity
from streamline_hooks.cli.short_forms import parse_loss
from streamline_hooks.evaluation import Candidate, Cost, distances_of_candidates, measure_pace
from streamline_hooks.repair import DistillationConfig, Student, train
from streamline_hooks.replacements import LinearReplacement, MLPReplacement
from streamline_hooks.selection.search.judge import Attempt, Judge
from streamline_hooks.statistics import measure_moments, profile
from tests.evaluation.fake_clock import FakeClock
from tests.tiny_models import BLOCKS, VOCABULARY, WIDTH, Nudge, left_padded, tiny_model, tokens

EMBEDDING, HEAD = 0.25, 5.0
WINDOWS = [range(0, 2), range(2, 5), range(3, BLOCKS)]
BATCHES = [tokens(2, 7), tokens(3, 9), tokens(1, 4)]


def charged() -> tuple[nn.Module, FakeClock]:
    """A model whose block k takes k + 1 seconds a token."""
    model, clock = tiny_model("llama"), FakeClock()
    clock.charge(model.model.embed_tokens, EMBEDDING)
    clock.charge(model.lm_head, HEAD)
    for k, block in enumerate(model.model.layers):
        clock.charge(block.mlp, k + 1.0)
    return model, clock


def test_the_parts_are_told_apart() -> None:
    model, clock = charged()
    pace = measure_pace(model, tokens(2, 7), clock=clock)
    assert pace.blocks == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (pace.before, pace.after) == pytest.approx((EMBEDDING, HEAD))
    assert (pace.features, pace.widest, pace.vocabulary, pace.state_size, pace.logit_size) == (
        WIDTH,
        48,
        VOCABULARY,
        4,
        4,
    )


@pytest.mark.parametrize("windows", [WINDOWS, WINDOWS[:1], WINDOWS[1:2]])
def test_every_pass_takes_what_it_was_told_to(windows: list[range]) -> None:
    model, clock = charged()
    pace = measure_pace(model, BATCHES[0], clock=clock)
    passes = [
        (pace.rank(BATCHES), lambda: profile(model, BATCHES)),
        (pace.fit(BATCHES, windows), lambda: measure_moments(model, BATCHES, windows)),
        (
            pace.judge(BATCHES, windows),
            lambda: distances_of_candidates(model, BATCHES, [Candidate(w) for w in windows]),
        ),
        (pace.perplexity(BATCHES), lambda: perplexity(model, BATCHES)),
        (
            pace.judge(BATCHES, windows, whole=True),
            lambda: Judge(find_stack(model), BATCHES).distances([Attempt(Selection((w,))) for w in windows], "judge"),
        ),
    ]
    for cost, run in passes:
        before = clock.now
        run()
        assert cost.seconds == pytest.approx(clock.now - before), cost.what
        assert cost.tokens == 2 * 7 + 3 * 9 + 1 * 4


@pytest.mark.parametrize("window", [range(0, 2), range(2, 5)])
@pytest.mark.parametrize(("objective", "epochs"), [("kl", 1), ("kl", 3), ("mse", 2)])
def test_a_training_takes_its_forwards_and_as_much_again_on_the_way_back(
    window: range, objective: str, epochs: int
) -> None:
    """The clock is moved by forwards alone; what a stand-in takes is left out of both."""
    model, clock = charged()
    cost = measure_pace(model, BATCHES[0], clock=clock).train(
        BATCHES, BATCHES[:1], [window], epochs=epochs, validations=2, logits=objective == "kl"
    )
    student = Student(model, [(window, LinearReplacement(WIDTH))])
    settings = DistillationConfig(loss=parse_loss(objective), epochs=epochs, validations=2)
    before = clock.now
    train(student, BATCHES, BATCHES[:1], settings)
    ran = clock.now - before
    back = epochs * 45 * (sum(k + 1.0 for k in range(window.stop, BLOCKS)) + HEAD) if objective == "kl" else 0.0
    assert cost.seconds == pytest.approx(ran + back, rel=0.05)
    assert cost.tokens == 45 * epochs


def test_padding_is_run_and_counted() -> None:
    model, clock = charged()
    batches = [left_padded(3, 9)]
    cost = measure_pace(model, batches[0], clock=clock).rank(batches)
    before = clock.now
    profile(model, batches)
    assert cost.tokens == 27 and cost.seconds == pytest.approx(clock.now - before)


@given(st.sets(st.integers(0, len(WINDOWS) - 1), min_size=1))
def test_a_shortlist_costs_its_share(chosen: set[int]) -> None:
    """On the mean over which windows are taken, judging is told right; fitting is never told too little."""
    model, clock = charged()
    pace, count = measure_pace(model, BATCHES[0], clock=clock), len(chosen)
    told = pace.judge(BATCHES, WINDOWS, shortlist=count).seconds
    alone = [pace.judge(BATCHES, [w]).seconds for w in WINDOWS]
    whole = pace.perplexity(BATCHES).seconds
    assert told == pytest.approx(whole + count * (sum(alone) / len(alone) - whole))
    least = pace.fit(BATCHES, [WINDOWS[k] for k in chosen])
    assert pace.fit(BATCHES, WINDOWS, shortlist=count).seconds >= least.seconds
    assert pace.fit(BATCHES, WINDOWS, shortlist=count).bytes >= least.bytes - pace.features * 4 * 27 * 12


def test_the_sums_and_the_surgery_are_told_too() -> None:
    """A clock that moves at every reading: nothing that is timed comes out as nothing."""
    readings = iter(range(10**6))
    pace = measure_pace(tiny_model("llama"), tokens(2, 7), clock=lambda: float(next(readings)))
    assert min(pace.similarity, pace.moments, pace.reference, pace.likelihood, pace.surgery) > 0
    bare = measure_pace(tiny_model("llama"), tokens(2, 7), clock=FakeClock())
    assert (bare.similarity, bare.surgery, sum(bare.blocks)) == (0, 0, 0)
    forward = pace.before + sum(pace.blocks)
    assert pace.rank(BATCHES).seconds == pytest.approx(45 * (forward + pace.similarity))
    fit = pace.fit(BATCHES, WINDOWS).seconds
    assert fit == pytest.approx(45 * (forward + 3 * pace.moments))
    judge = pace.judge(BATCHES, [range(0, 2)])
    rest = pace.before + sum(pace.blocks[2:]) + pace.after + pace.divergence
    assert judge.seconds == pytest.approx(45 * (forward + pace.after + pace.reference + rest) + 3 * pace.surgery)
    assert pace.judge(BATCHES, [range(0, 2)], replacement=Nudge()).seconds > judge.seconds
    module = MLPReplacement(WIDTH, 4 * WIDTH, linear=False)
    beside = pace.fit(BATCHES, WINDOWS, replacement=module, beside=True)
    sums = 4 * (4 + 1) / 2 * pace.moments  # of 4·d features among themselves and with the state
    extra = pace.after * 2 * 4 * WIDTH / VOCABULARY  # the network, at the pace of the head
    assert beside.seconds == pytest.approx(45 * (forward + 3 * (sums + extra)))
    assert beside.bytes > pace.fit(BATCHES, WINDOWS).bytes == pace.fit(BATCHES, WINDOWS, replacement=module).bytes


def test_memory_is_that_of_the_largest_batch() -> None:
    model = tiny_model("llama")
    pace = measure_pace(model, BATCHES[0])
    for cost in (
        pace.rank,
        lambda batches: pace.fit(batches, WINDOWS),
        lambda batches: pace.judge(batches, WINDOWS),
        pace.perplexity,
    ):
        assert cost(BATCHES).bytes == cost(BATCHES * 100).bytes == cost(BATCHES[1:2]).bytes
        assert cost([tokens(6, 9)]).bytes > cost(BATCHES).bytes
    with HiddenStateRecorder(model) as record:
        record(input_ids=BATCHES[1])
    kept = {s.data_ptr(): s.numel() * 4 for v in (*record.inputs.values(), *record.outputs.values()) for s in v}
    assert sum(kept.values()) == (BLOCKS + 1) * 27 * WIDTH * 4
    assert 2 * sum(kept.values()) <= pace.rank(BATCHES).bytes <= 12 * sum(kept.values())
    assert pace.judge(BATCHES, WINDOWS).bytes >= 4 * 27 * VOCABULARY * 4
    one, two = pace.fit(BATCHES, WINDOWS[:1]), pace.fit(BATCHES, WINDOWS[:1], sums=2)
    assert two.bytes - one.bytes == 2 * WIDTH**2 * 8


def test_a_part_of_the_batch_is_enough_on_a_cpu() -> None:
    model, seen = tiny_model("llama"), []
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    measure_pace(model, {"input_ids": tokens(30, 100), "attention_mask": torch.ones(30, 100, dtype=torch.long)})
    assert set(seen) == {(5, 100)} and len(seen) == 4


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    measure_pace(model, tokens(1, 5))
    assert all(m.training for m in model.modules()) and len(model.model.layers) == BLOCKS

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    model.model.layers[3].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        measure_pace(model, tokens(1, 5))
    assert all(not block._forward_hooks and not block._forward_pre_hooks for block in model.model.layers)


def test_in_words() -> None:
    rank = Cost("rank", 40_960, 95.4, 412_000_000)
    assert str(rank) == "rank: 41k tokens, about 95 s, 0.4 GB above the model"
    assert str(Cost("judge 8 windows", 512, 600.0, 5_000_000)) == (
        "judge 8 windows: 512 tokens, about 10 min, 5 MB above the model"
    )
    assert "about 2.5 h" in str(Cost("rank", 1, 9000.0, 0)) and "about 0.3 s" in str(Cost("rank", 1, 0.31, 0))
    assert rank + Cost("fit", 10, 5.0, 10**9) == Cost("rank, fit", 40_970, 100.4, 10**9)


def test_what_cannot_be_told() -> None:
    model = tiny_model("llama")
    pace = measure_pace(model.model, tokens(1, 5))
    assert pace.rank(BATCHES).tokens == 45
    for cost in (pace.perplexity, lambda batches: pace.judge(batches, WINDOWS)):
        with pytest.raises(StreamlineError, match=r"no logits.*give.*LM head"):
            cost(BATCHES)
    with pytest.raises(StreamlineError, match="no batch"):
        pace.rank([])
    with pytest.raises(StreamlineError, match="Got 0 windows"):
        pace.fit(BATCHES, [])
    with pytest.raises(StreamlineError, match=r"input_ids of shape \(batch, tokens\)"):
        measure_pace(model, {"pixel_values": torch.zeros(1, 3, 4, 4)})
    model.compile()
    with pytest.raises(StreamlineError, match=r"Cannot time.*compiled"):
        measure_pace(model, tokens(1, 5))
