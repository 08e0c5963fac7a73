"""Speed by a clock that only moves where the test says so; no real time is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.evaluation import SpeedReport, Timing, measure_speed, speed
from tests.evaluation.fake_clock import FakeClock
from tests.tiny_models import BLOCKS, Nudge, tiny_model


def charged(clock: FakeClock, seconds_a_token: float = 1.0) -> nn.Module:
    model = tiny_model("llama")
    for block in model.model.layers:
        clock.charge(block.mlp, seconds_a_token)
    return model


def report(**times: tuple[float, ...]) -> SpeedReport:
    timings = {
        name: Timing(values, tuple(v / 10 for v in values), 1, "float32", "cpu", None) for name, values in times.items()
    }
    return SpeedReport(timings, 2, 50, 4, 1, "here")


def test_the_prompt_is_run_once_and_each_further_token_alone() -> None:
    clock = FakeClock()
    got = measure_speed({"a": charged(clock)}, batch=3, tokens=10, new_tokens=4, repeats=2, clock=clock)
    assert got.timings["a"].prefill == (BLOCKS * 30.0,) * 2
    assert got.timings["a"].decode == (BLOCKS * 3.0,) * 2  # without a cache it would be ten times that, and grow


def test_the_head_sees_the_last_place_of_the_prompt_only() -> None:
    clock, model = FakeClock(), tiny_model("llama")
    clock.charge(model.lm_head, 1.0)
    got = measure_speed({"a": model}, batch=2, tokens=10, new_tokens=1, repeats=1, clock=clock)
    assert got.timings["a"].prefill == (2.0,)


def test_prefill_alone() -> None:
    clock = FakeClock()
    got = measure_speed({"a": charged(clock)}, tokens=10, new_tokens=0, repeats=1, clock=clock)
    assert got.timings["a"].prefill == (BLOCKS * 10.0,) and got.timings["a"].decode == ()
    assert "decode" not in got.table() and set(got.to_dict()["ratios"]["a"]) == {"prefill"}
    with pytest.raises(StreamlineError, match=r"new_tokens.*0"):
        got.ratio("a", "decode")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_in_training_mode_has_its_turns(family: str) -> None:
    model = tiny_model(family).train()
    got = measure_speed({"a": model}, batch=2, tokens=9, new_tokens=2, repeats=2)
    assert len(got.timings["a"].prefill) == len(got.timings["a"].decode) == 2
    assert all(m.training for m in model.modules())
    assert got.timings["a"].parameters == sum(p.numel() for p in model.parameters())
    assert (got.timings["a"].dtype, got.timings["a"].device) == ("float32", "cpu")
    assert got.timings["a"].peak_memory is None  # a CPU cannot tell


def test_models_take_turns_and_begin_in_turn() -> None:
    order: list[str] = []
    models = {name: tiny_model("llama") for name in "abc"}
    for name, model in models.items():
        model.model.embed_tokens.register_forward_hook(lambda *_, name=name: order.append(name))
    measure_speed(models, tokens=3, new_tokens=0, repeats=4, warm_up=1)
    assert "".join(order) == "abcbcacababcbca"


def test_the_warm_up_does_not_count() -> None:
    clock, model, calls = FakeClock(), tiny_model("llama"), []

    def slow_at_first(*_: object) -> None:
        calls.append(1)
        clock.now += 1000.0 if len(calls) <= 2 else 1.0

    model.model.embed_tokens.register_forward_hook(slow_at_first)
    got = measure_speed({"a": model}, tokens=3, new_tokens=0, repeats=3, warm_up=2, clock=clock)
    assert got.timings["a"].prefill == (1.0, 1.0, 1.0)
    calls.clear()
    got = measure_speed({"a": model}, tokens=3, new_tokens=0, repeats=3, warm_up=0, clock=clock)
    assert got.timings["a"].prefill == (1000.0, 1000.0, 1.0)


def test_a_load_that_comes_and_goes_leaves_the_ratio() -> None:
    clock, turns = FakeClock(), []
    models = {"slow": charged(clock, 2.0), "fast": charged(clock, 1.0)}

    @contextmanager
    def under_load(name: str) -> Iterator[nn.Module]:
        clock.load = (1.0, 7.0, 3.0)[len(turns) // 2]  # by round
        turns.append(name)
        yield models[name]

    under = {"slow": lambda: under_load("slow"), "fast": lambda: under_load("fast")}
    got = measure_speed(under, tokens=4, new_tokens=0, repeats=3, warm_up=0, clock=clock)
    assert len(set(got.timings["fast"].prefill)) == 3  # the load was there
    ratio = got.ratio("fast")
    assert (ratio.median, ratio.low, ratio.high) == (0.5, 0.5, 0.5)
    # One model after the other would have given another ratio; the spread of the times shows the load.
    assert got.seconds("fast").high > 1.5 * got.seconds("fast").low


def test_a_model_that_is_changed_for_its_turn() -> None:
    clock = FakeClock()
    model = charged(clock)

    @contextmanager
    def shorter() -> Iterator[nn.Module]:
        clock.now += 1000.0  # opening is not timed
        with LayerSurgeon(model, probe=False) as surgeon:
            surgeon.replace(range(1, 3), Nudge())
            yield model
        clock.now += 1000.0

    got = measure_speed({"whole": model, "shorter": shorter}, tokens=5, new_tokens=2, repeats=3, clock=clock)
    for phase in ("prefill", "decode"):
        assert got.ratio("shorter", phase).median == pytest.approx((BLOCKS - 2) / BLOCKS)
    assert got.timings["shorter"].parameters < got.timings["whole"].parameters
    assert len(model.model.layers) == BLOCKS


def test_a_model_that_would_stop_goes_on() -> None:
    model = tiny_model("llama")
    prompt = torch.ones(1, 3, dtype=torch.long)
    model.generation_config.eos_token_id = list(range(3, 61))
    assert model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0).shape[1] < 11  # it would
    assert len(measure_speed({"a": model}, tokens=3, new_tokens=7, repeats=1).timings["a"].decode) == 1
    model.generate = lambda **given: None
    with pytest.raises(StreamlineError, match="stopped after 0 of 8 tokens"):
        measure_speed({"a": model}, tokens=3, new_tokens=7, repeats=1)


def test_the_prompt_holds_no_token_with_a_meaning() -> None:
    model, seen = tiny_model("llama"), []
    model.config.image_token_id = 7
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    measure_speed({"a": model}, tokens=100, batch=10, new_tokens=0, repeats=1, warm_up=0)
    assert seen[0].shape == (10, 100)
    assert set(seen[0].flatten().tolist()) == set(range(61)) - {0, 1, 2, 7}


def test_an_accelerator_is_waited_for_and_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one at hand: what would be asked of it, in which order."""
    happened: list[str] = []
    device = torch.device("cuda", 0)

    class Device:
        @staticmethod
        def synchronize(which: torch.device) -> None:
            assert which == device
            happened.append("wait")

    def clock() -> float:
        happened.append("clock")
        return float(len(happened))

    allocated = iter([1000, 2000, 3000])
    monkeypatch.setattr(speed, "accelerators_of", lambda model: [device])
    monkeypatch.setattr(torch, "get_device_module", lambda which: Device)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda which: happened.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda which: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda which: 7000)
    got = measure_speed({"a": tiny_model("llama")}, tokens=3, new_tokens=5, repeats=2, warm_up=1, clock=clock)
    # Before it starts, at the first token and at the last; not at those between, where it may run ahead.
    assert happened == ["reset", *["wait", "clock"] * 3] * 3
    assert got.timings["a"].peak_memory == 5000  # of two rounds, above 2000 and 3000
    assert "0 MB" in got.table()


@given(
    st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=9),
)
def test_medians_and_quartiles(pairs: list[tuple[float, float]]) -> None:
    first, other = (tuple(values) for values in zip(*pairs, strict=True))
    got = report(first=first, other=other)
    ratio = got.ratio("other")
    quartiles = np.percentile(np.divide(other, first), [25, 50, 75]).tolist()
    assert [ratio.low, ratio.median, ratio.high] == pytest.approx(quartiles)
    assert ratio.low <= ratio.median <= ratio.high
    assert got.tokens_per_second("other") == pytest.approx(2 * 50 / np.median(other))
    assert got.tokens_per_second("other", "decode") == pytest.approx(2 / np.median(np.array(other) / 10))
    assert got.seconds("first").median == pytest.approx(np.median(first))


def test_what_is_written() -> None:
    got = report(original=(2.0, 1.0, 3.0), shorter=(1.0, 1.0, 1.5))
    assert got.table().splitlines() == [
        "2 x 50 tokens, 4 more; median of 3 alternating rounds; float32, cpu, 1 threads, here",
        "model     phase        ms  quartiles         tokens/s  ratio  quartiles       peak memory",
        "original  prefill  2000.0  1500.0 to 2500.0      50.0  1.000  1.000 to 1.000  n/a",
        "original  decode    200.0  150.0 to 250.0        10.0  1.000  1.000 to 1.000  n/a",
        "shorter   prefill  1000.0  1000.0 to 1250.0     100.0  0.500  0.500 to 0.750  n/a",
        "shorter   decode    100.0  100.0 to 125.0        20.0  0.500  0.500 to 0.750  n/a",
    ]
    written = json.loads(json.dumps(got.to_dict()))
    assert written["timings"]["shorter"]["prefill"] == [1.0, 1.0, 1.5]
    assert written["ratios"]["shorter"]["prefill"]["median"] == 0.5
    assert written["machine"] == "here" and written["threads"] == 1


def test_what_cannot_be_timed() -> None:
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match=r"a Linear.*cannot generate.*causal language model"):
        measure_speed({"a": nn.Linear(2, 2)})
    with pytest.raises(StreamlineError, match=r"528 exceeds the 128 positions"):
        measure_speed({"a": model})
    with pytest.raises(StreamlineError, match=r"generate.*uncompiled"):
        measure_speed({"a": torch.compile(model)}, tokens=4)
    with pytest.raises(StreamlineError, match="received 0 models"):
        measure_speed({})
    with pytest.raises(StreamlineError, match="repeats=0"):
        measure_speed({"a": model}, repeats=0)
    with pytest.raises(StreamlineError, match=r"'b'.*Expected one of a"):
        report(a=(1.0,)).seconds("b")
    still = measure_speed({"a": model}, tokens=4, new_tokens=1, repeats=1, clock=lambda: 5.0)
    with pytest.raises(StreamlineError, match="time is 0 seconds"):
        still.ratio("a")
