"""What a target comes to, and which windows are free."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from functools import partial
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError, find_stack
from streamline_hooks.cli import parse_replacement, parse_target
from streamline_hooks.core import UnsupportedSurgery, model_size
from streamline_hooks.evaluation import SpeedReport, Timing, measure_speed
from streamline_hooks.repair import BlockConfig, FoldedMap, insert_replacement
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.selection import (
    Target,
    blocks_to_remove,
    protected_blocks,
    target_windows,
    windows_of_size,
)
from streamline_hooks.surgery import find_hazards
from streamline_hooks.testing import tiny_model as tiny_of_type
from tests.evaluation.fake_clock import FakeClock
from tests.tiny_models import BLOCKS, WIDTH, Nudge, repaired, tiny_model


def windows_for(*given: Any, **options: Any) -> list[range]:
    return list(target_windows(*given, **options).windows)


@pytest.mark.parametrize(
    ("target", "length", "slots", "count"),
    [
        (0.25, 30, 0, 8),  # 7.5 is rounded half up
        (0.25, 30, 1, 9),  # a replacement with a slot of its own
        (0.25, 32, 0, 8),
        (0.02, 30, 0, 1),
        (0.5, 3, 0, 2),
        (8, 30, 0, 8),
        (8.0, 30, 0, 8),
        (1, 2, 0, 1),
    ],
)
def test_targets(target: float, length: int, slots: int, count: int) -> None:
    assert blocks_to_remove(target, length, slots) == count


@pytest.mark.parametrize("target", [0, 0.0, -1, -0.25, 2.5, True, 1.0, float("nan"), float("inf"), "8", None])
def test_nothing_that_can_be_removed(target: Any) -> None:
    with pytest.raises(StreamlineError, match=rf"remove={target!r}.*remove=8"):
        blocks_to_remove(target, 30)


@pytest.mark.parametrize("target", [1e-9, 0.01])
def test_fractions_that_come_to_no_block(target: float) -> None:
    with pytest.raises(StreamlineError, match=f"fraction={target}.*remove=1 "):
        blocks_to_remove(target, 30)


@pytest.mark.parametrize("target", [30, 31, 0.99])
def test_everything(target: float) -> None:
    with pytest.raises(StreamlineError, match=r"of 30 blocks.*must stay"):
        blocks_to_remove(target, 30)


@given(st.integers(2, 12), st.data())
def test_windows_are_all_those_without_a_protected_block(length: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, length))
    keep = data.draw(st.sets(st.integers(-length, length - 1), max_size=3))
    protected = protected_blocks(keep, length)
    expected = [
        range(a, a + size)
        for a in range(length)
        if a + size <= length and not any(k in protected for k in range(a, a + size))
    ]
    if expected:
        assert windows_of_size(length, size, protected) == expected
    else:
        with pytest.raises(StreamlineError, match=rf"of {size} .*{length} is without"):
            windows_of_size(length, size, protected)


def test_protected_blocks_out_of_range() -> None:
    assert protected_blocks([0, -1], 5) == {0, 4}
    with pytest.raises(StreamlineError, match=r"protect: block 5.*0 to 4.*5 blocks"):
        protected_blocks([5], 5)


@pytest.mark.parametrize(
    ("target", "unit", "amount", "text"),
    [
        (Target(blocks=8), "blocks", 8, "8"),
        (Target(fraction=0.25), "fraction", 0.25, "0.25"),
        (Target(parameters=0.2), "parameters", 0.2, "parameters:0.2"),
        (Target(latency=0.8), "latency", 0.8, "latency:0.8"),
        (Target(decode_latency=0.8), "decode_latency", 0.8, "decode-latency:0.8"),
        (Target(memory_bytes=90e6), "memory_bytes", 90_000_000, "memory:90MB"),
        (Target(memory_bytes=90_000_001), "memory_bytes", 90_000_001, "memory:90000001B"),
        (Target(seconds_per_token=0.02), "seconds_per_token", 0.02, "seconds-per-token:0.02"),
        (Target(seconds_per_token=2), "seconds_per_token", 2, "seconds-per-token:2"),
    ],
)
def test_the_field_that_is_set(target: Target, unit: str, amount: float, text: str) -> None:
    assert (target.unit, target.amount, str(target)) == (unit, amount, text)
    assert target.counts_blocks == (unit in ("blocks", "fraction"))
    assert repr(target) == f"Target({unit}={amount})" and eval(repr(target)) == target == Target.of(target)
    assert parse_target(text) == target == Target.from_dict(target.to_dict())
    assert type(target.amount) is type(amount)
    assert target.is_timed == (unit in ("latency", "decode_latency", "seconds_per_token"))


@pytest.mark.parametrize(
    ("number", "target"),
    [(8, Target(blocks=8)), (8.0, Target(blocks=8)), (0.25, Target(fraction=0.25))],
)
def test_plain_numbers(number: float, target: Target) -> None:
    assert Target.of(number) == target


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "no field"),
        ({"blocks": 8, "latency": 0.8}, "blocks=8, latency=0.8"),
        ({"blocks": 0}, "blocks=0"),
        ({"blocks": 2.5}, "2.5"),
        ({"blocks": True}, "True"),
        ({"fraction": 0.0}, "fraction=0.0"),
        ({"fraction": 1.0}, "fraction=1.0"),
        ({"fraction": "0.25"}, "'0.25'"),
        ({"parameters": 1.0}, "parameters=1.0"),
        ({"latency": 1.2}, "latency=1.2"),
        ({"latency": float("nan")}, "latency=nan"),
        ({"decode_latency": -0.5}, "decode_latency=-0.5"),
        ({"memory_bytes": 0.5}, "memory_bytes=0.5"),
        ({"memory_bytes": "90MB"}, "'90MB'"),
        ({"memory_bytes": float("inf")}, "inf"),
        ({"seconds_per_token": 0.0}, "seconds_per_token=0.0"),
        ({"seconds_per_token": True}, "True"),
        ({"seconds_per_token": 0.02, "memory_bytes": 5}, "memory_bytes=5, seconds_per_token=0.02"),
    ],
)
def test_targets_that_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(StreamlineError, match=rf"{re.escape(named)}.*(Set|Give|Pass)"):
        Target(**fields)


def test_a_number_of_blocks() -> None:
    model = tiny_model("llama")
    assert windows_for(model, 2) == windows_for(model, Target(blocks=2)) == windows_of_size(BLOCKS, 2)
    assert windows_for(model, 0.5, protected=frozenset({0})) == windows_of_size(BLOCKS, 3, frozenset({0}))
    assert windows_for(model, 2, slots=1) == windows_of_size(BLOCKS, 3)
    with pytest.raises(StreamlineError, match=r"blocks=6.*6 of 6 blocks"):
        windows_for(model, 6)
    with pytest.raises(StreamlineError, match=r"layers has one block"):
        windows_for(nn.ModuleDict({"layers": nn.Sequential(nn.Linear(2, 2))}), 1, stack="layers")


def sharing() -> nn.Module:
    """Blocks 2 and 4 have one MLP, and block 0's is the embedding's neighbor outside the stack too."""
    model = tiny_model("llama")
    model.model.layers[4].mlp = model.model.layers[2].mlp
    model.model.also_here = model.model.layers[0].mlp
    return model


MODELS = {
    "equal": lambda: tiny_model("llama"),
    "dense beside experts": lambda: tiny_of_type("deepseek_v3", blocks=6),
    "hybrid": lambda: tiny_of_type("jamba", blocks=6),
    "shared": sharing,
    "shared by the architecture": lambda: tiny_of_type("zamba2", blocks=6),
    "repaired": lambda: repaired("llama"),
    "repaired at the end": lambda: repaired("llama", range(4, 6)),
}


@functools.cache
def counted(name: str) -> tuple[nn.Module, int, dict[range, int]]:
    """A model, its parameters, and how many each window leaves, by doing it."""
    model = MODELS[name]()
    length = len(blocks_of(model))
    left = {}
    for start in range(length):
        for stop in range(start + 1, length + 1):
            if stop - start < length:
                with LayerSurgeon(model, probe=False) as surgeon:
                    surgeon.remove(range(start, stop), despite_hazards=True)
                    left[range(start, stop)] = sum(p.numel() for p in model.parameters())
    return model, sum(p.numel() for p in model.parameters()), left


def blocks_of(model: nn.Module) -> Any:
    return model.model.layers


@pytest.mark.parametrize("name", MODELS)
@given(data=st.data())
def test_the_shortest_windows_that_save_the_parameters(name: str, data: st.DataObject) -> None:
    model, total, left = counted(name)
    length = len(blocks_of(model))
    fraction = data.draw(st.sampled_from(sorted({(total - n) / total for n in left.values()})) | st.floats(0.01, 0.9))
    protected = frozenset(data.draw(st.sets(st.integers(0, length - 1), max_size=2)))
    replacement_module = data.draw(
        st.sampled_from([None, Nudge(), LinearReplacement(WIDTH), lambda w: Nudge(2 * len(w))])
    )
    expected = []
    for start in range(length):
        for stop in range(start + 1, length + 1):
            window = range(start, stop)
            added = 0
            if replacement_module is not None:
                module = replacement_module if isinstance(replacement_module, nn.Module) else replacement_module(window)
                added = sum(p.numel() for p in module.parameters())
            if (
                window in left
                and not protected & set(window)
                and total - left[window] - added >= fraction * total - 1e-6
            ):
                expected.append(window)
                break
    target = Target(parameters=fraction) if 0 < fraction < 1 else None
    if target is None:
        return
    if expected:
        assert windows_for(model, target, protected=protected, replacement_module=replacement_module) == expected
    else:
        with pytest.raises(StreamlineError, match="cannot be reached: the best window|without a protected block"):
            windows_for(model, target, protected=protected, replacement_module=replacement_module)


def test_blocks_of_different_sizes_make_windows_of_different_lengths() -> None:
    model, total, left = counted("dense beside experts")
    found = windows_for(model, Target(parameters=0.5))
    assert len({len(window) for window in found}) > 1
    assert all(total - left[window] >= 0.5 * total for window in found)


def test_parameters_that_cannot_be_saved() -> None:
    model, total, left = counted("equal")
    most = total - left[range(1, BLOCKS)]
    with pytest.raises(
        StreamlineError,
        match=rf"parameters:0.95.*0 to 4.*{most:,} of.*{total:,} parameters.*{most / total:.1%}",
    ):
        windows_for(model, Target(parameters=0.95))
    with pytest.raises(StreamlineError, match=r"of 1.*6 is"):
        windows_for(model, Target(parameters=0.1), protected=frozenset(range(BLOCKS)))


@pytest.mark.parametrize("count", [1, 2])
def test_inherited_blocks_are_counted_and_leave_a_shorter_stack(count: int) -> None:
    model = tiny_model("llama")
    stack, kind = find_stack(model), parse_replacement(f"block:count={count}")
    assert windows_for(model, 2, slots=count) == windows_of_size(BLOCKS, 2 + count)
    size, total = stack.parameters_per_block[0], sum(p.numel() for p in model.parameters())
    options: dict[str, Any] = {"replacement_module": lambda window: kind.make(stack, window), "slots": count}
    for fewer in (1, 2):
        found = windows_for(model, Target(parameters=fewer * size / total), **options)
        assert found == windows_of_size(BLOCKS, fewer + count)
    with pytest.raises(StreamlineError, match=rf"{(5 - count) * size:,} of"):
        windows_for(model, Target(parameters=0.9), **options)
    with pytest.raises(StreamlineError, match=r"5 blocks.*of 6"):
        windows_for(model, 1, slots=5)


def test_inherited_blocks_are_timed_with_the_rest() -> None:
    model, (_, timer) = charged()
    stack, kind = find_stack(model), BlockConfig(count=2)
    options: dict[str, Any] = {"replacement_module": lambda window: kind.make(stack, window), "slots": 2}
    options["timer"] = timer
    for fewer in (1, 2, 3):
        ratio = ((BLOCKS - fewer) * 4 + HEAD) / (BLOCKS * 4 + HEAD) + 0.01
        assert windows_for(model, Target(latency=ratio), **options) == windows_of_size(BLOCKS, fewer + 2)


def test_what_is_folded_has_no_parameters() -> None:
    model = tiny_model("llama")
    folded = FoldedMap(range(1, 3), torch.eye(WIDTH), 0.0, 0.0, 0.0)
    assert windows_for(model, Target(parameters=0.3), replacement_module=folded) == windows_for(
        model, Target(parameters=0.3)
    )


def test_a_stand_in_is_made_on_the_meta_device_to_be_counted() -> None:
    devices = []

    def make(window: range) -> nn.Module:
        module = LinearReplacement(WIDTH)
        devices.append(module.projection.weight.device.type)
        return module

    windows_for(tiny_model("llama"), Target(parameters=0.3), replacement_module=make)
    assert set(devices) == {"meta"}


SIZED: dict[str, Callable[[], nn.Module]] = {
    **{name: MODELS[name] for name in ("equal", "dense beside experts", "hybrid", "shared", "repaired at the end")},
    "tied": lambda: tiny_of_type("gemma3_text", blocks=6),
    "half": lambda: tiny_model("llama", torch.bfloat16),
    "mixed": lambda: mixed(),
    "slices outside the blocks": lambda: tiny_of_type("gemma3n_text", blocks=6),
}


def mixed() -> nn.Module:
    """A model in bfloat16 with one MLP and the embeddings in float32."""
    model = tiny_model("llama", torch.bfloat16)
    model.model.layers[2].mlp.float()
    model.model.embed_tokens.float()
    return model


def mixed_module(window: range) -> nn.Module:
    """A module of which most is in bfloat16, which keeps its parameter in float32."""
    module = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
    module.bias = nn.Parameter(torch.zeros(WIDTH, device=module.weight.device))
    return module


REPLACED: dict[str, Any] = {
    "nothing": None,
    "linear": LinearReplacement(WIDTH),
    "for each": lambda window: Nudge(2 * len(window)),
    "in two precisions": mixed_module,
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("replaced", REPLACED)
@pytest.mark.parametrize("name", SIZED)
def test_the_bytes_that_are_predicted_are_those_of_the_compressed_model(name: str, replaced: str) -> None:
    model, replacement_module = SIZED[name](), REPLACED[replaced]
    before, stack = model_size(model), find_stack(model)
    for fraction in (0.9, 0.7):
        target = Target(memory_bytes=fraction * before[1])
        found = target_windows(model, target, replacement_module=replacement_module)
        windows = [w for w in found.windows if name == "shared" or not find_hazards(stack, w)]
        assert found.original == before[1] and (windows or name == "hybrid")
        for window in windows:
            with LayerSurgeon(model, probe=False) as surgeon:
                surgeon.replace(window, module_for(replacement_module, window), despite_hazards=name == "shared")
                left = model_size(model)[1]
            assert found.predicted[window] == left <= target.amount, window
        if windows and name != "shared":  # no checkpoint could hold that one
            shorter = copy.deepcopy(model)
            with LayerSurgeon(shorter, probe=False) as surgeon:
                insert_replacement(surgeon, windows[-1], module_for(replacement_module, windows[-1]))
                surgeon.commit()
            outcome = found.outcome(windows[-1:], shorter, before=before)
            assert outcome is not None and outcome.measured == model_size(shorter)[1]
            assert outcome.relative_error == 0.0 and outcome.is_reached and not outcome.warning


def module_for(replacement_module: Any, window: range) -> nn.Module | None:
    """A module of its own for a window."""
    is_function = callable(replacement_module) and not isinstance(replacement_module, nn.Module)
    return replacement_module(window) if is_function else copy.deepcopy(replacement_module)


def test_bytes_are_reached_by_the_shortest_window_from_each_start() -> None:
    model = tiny_of_type("deepseek_v3", blocks=6)
    total, every = model_size(model)[1], counted("dense beside experts")[2]
    limit = 0.5 * total
    found = target_windows(model, Target(memory_bytes=limit))
    shortest: dict[int, range] = {}
    for window, left in sorted(every.items(), key=lambda pair: len(pair[0])):
        if 4 * left <= limit:
            shortest.setdefault(window.start, window)
    assert list(found.windows) == sorted(shortest.values(), key=lambda window: window.start)
    assert len({len(window) for window in found.windows}) > 1
    assert found.predicted == {window: 4.0 * every[window] for window in found.windows}


def test_bytes_that_are_there_already_and_bytes_that_no_cut_reaches() -> None:
    model, _, left = counted("equal")
    size = model_size(model)[1]
    for amount in (size, size + 1, 10 * size):
        with pytest.raises(StreamlineError, match=rf"already met.*{size:,} bytes with all 6.*memory_bytes="):
            windows_for(model, Target(memory_bytes=amount))
    least = 4 * left[range(1, BLOCKS)]
    with pytest.raises(StreamlineError, match=rf"cannot be reached.*blocks 0 to 4.*leaves {least:,} bytes"):
        windows_for(model, Target(memory_bytes=least - 1))
    assert windows_for(model, Target(memory_bytes=least)) == windows_of_size(BLOCKS, 5)
    assert windows_for(model, Target(memory_bytes=size - 1)) == windows_of_size(BLOCKS, 1)
    with pytest.raises(StreamlineError, match=r"of 1.*6 is"):
        windows_for(model, Target(memory_bytes=least), protected=frozenset(range(BLOCKS)))


HEAD = 2.0


def charged() -> tuple[nn.Module, Any]:
    """A model whose block takes a second a token, and whose head two."""
    model, clock = tiny_model("llama"), FakeClock()
    for block in model.model.layers:
        clock.charge(block.mlp, 1.0)
    clock.charge(model.lm_head, HEAD)
    return model, (clock, partial(measure_speed, tokens=4, new_tokens=2, repeats=1, warm_up=0, clock=clock))


def test_latency_comes_to_the_fewest_blocks_that_reach_it(log_messages: list[str]) -> None:
    model, (_, timer) = charged()
    for count in range(1, BLOCKS):
        for of, tokens in (("latency", 4), ("decode_latency", 1)):
            ratio = ((BLOCKS - count) * tokens + HEAD) / (BLOCKS * tokens + HEAD)
            log_messages.clear()
            found = windows_for(model, Target(**{of: ratio + 0.01}), timer=timer)
            assert found == windows_of_size(BLOCKS, count), (of, count)
            assert len(log_messages) <= 4  # the line through what was measured leads there; the last one is repeated
            phase = "the first token" if of == "latency" else "each further token"
            assert any(
                line.startswith(f"without {count} of 6 blocks, {phase} takes {ratio:.3f} of") for line in log_messages
            )
    assert len(model.model.layers) == BLOCKS


@pytest.mark.long
def test_seconds_per_token_come_to_the_fewest_blocks_that_reach_them() -> None:
    model, (_, timer) = charged()
    for count in range(1, BLOCKS):
        seconds = BLOCKS - count + HEAD
        found = target_windows(model, Target(seconds_per_token=seconds + 0.01), timer=timer)
        assert list(found.windows) == windows_of_size(BLOCKS, count)
        assert found.original == pytest.approx(BLOCKS + HEAD)
        assert found.predicted == pytest.approx(dict.fromkeys(found.windows, seconds))
    with pytest.raises(StreamlineError, match=rf"already met: with all 6 blocks a token takes {BLOCKS + HEAD:.4g} sec"):
        windows_for(model, Target(seconds_per_token=BLOCKS + HEAD), timer=timer)
    with pytest.raises(StreamlineError, match=r"2.5 seconds per token cannot be reached: without 5 of 6.*takes 3 sec"):
        windows_for(model, Target(seconds_per_token=2.5), timer=timer)
    with pytest.raises(StreamlineError, match=r"without 2 of 6 blocks.*takes 6 seconds per token"):
        windows_for(model, Target(seconds_per_token=4), timer=timer, protected=frozenset({2, 5}))


def test_seconds_are_those_of_the_original_times_a_ratio_so_that_load_cancels() -> None:
    """The machine is three times as slow whenever a candidate takes turns with the original."""
    model = tiny_model("llama")

    def timer(models: dict[str, Any], **options: Any) -> SpeedReport:
        load = 1.0 if len(models) == 1 else 3.0
        times = {name: load * (1.0 if k == 0 else 1 - int(name.split()[1]) / 10) for k, name in enumerate(models)}
        return SpeedReport({n: Timing((t,), (t,), 1, "", "", None) for n, t in times.items()}, 1, 1, 1, 1, "")

    found = target_windows(model, Target(seconds_per_token=0.71), timer=timer)
    assert list(found.windows) == windows_of_size(BLOCKS, 3)
    assert found.predicted == pytest.approx(dict.fromkeys(found.windows, 0.7))


def test_what_a_compression_reached() -> None:
    model, (clock, timer) = charged()
    found = target_windows(model, Target(seconds_per_token=6.5), timer=timer)
    window, before = found.windows[1], model_size(model)
    with LayerSurgeon(model, probe=False) as surgeon:
        surgeon.remove(window)
        surgeon.commit()
    outcome = found.outcome([window], model, before=before, timer=timer)
    assert outcome is not None and outcome.is_reached and not outcome.warning
    assert (outcome.original, outcome.predicted, outcome.measured) == pytest.approx((8.0, 6.0, 6.0))
    clock.charge(model.lm_head, 0.4)  # 6.7 % more: the prediction was off, and the target is missed
    late = found.outcome([window], model, before=before, timer=timer)
    assert late is not None and not late.relative_error < 0.06
    assert "off by more than 5%, seconds-per-token:6.5: 6,000.00 ms predicted" in late.warning
    assert "6,400.00 ms measured (+6.7%), 8,000.00 ms of the original" in late.warning
    assert late.to_dict()["target"] == {"seconds_per_token": 6.5} and late.to_dict()["reached"]
    assert found.outcome([range(0, 1), range(3, 4)], model, before=before) is None
    assert target_windows(model, 2).outcome([range(0, 2)], model, before=before) is None


def test_the_time_of_a_change_as_a_fraction() -> None:
    for unit, tokens in (("latency", 4), ("decode_latency", 1)):
        model, (_, timer) = charged()
        stack, whole = find_stack(model), BLOCKS * tokens + HEAD
        found = target_windows(model, Target(**{unit: 0.7}), timer=timer)
        ratio = found.time_ratio(stack, lambda surgeon: surgeon.remove(range(2, 4)), timer)
        assert ratio == pytest.approx((whole - 2 * tokens) / whole)
        outcome = found.outcome(found.windows[:1], model, before=(1, 1), ratio=ratio)
        assert outcome is not None and outcome.measured == ratio and outcome.original == 1.0
        with pytest.raises(StreamlineError, match=r"fraction of the original's time, but ratio=None.*time_ratio"):
            found.outcome(found.windows[:1], model, before=(1, 1), timer=timer)  # seconds are not a fraction
    for target in (2, Target(parameters=0.2), Target(memory_bytes=50_000)):
        assert target_windows(model, target).time_ratio(stack, lambda surgeon: None) is None


def test_what_stands_in_is_timed_with_the_rest() -> None:
    model, (clock, timer) = charged()

    class Slow(nn.Module):
        def forward(self, state: torch.Tensor) -> torch.Tensor:
            clock.now += 1.5 * state.shape[1]
            return state

    ratio = (4 * 4 + HEAD) / (6 * 4 + HEAD) + 0.01  # two blocks fewer
    assert windows_for(model, Target(latency=ratio), timer=timer) == windows_of_size(BLOCKS, 2)
    slow = Slow()
    for replacement_module in (slow, lambda window: Slow()):
        assert windows_for(
            model, Target(latency=ratio), timer=timer, replacement_module=replacement_module
        ) == windows_of_size(BLOCKS, 4)
    with pytest.raises(StreamlineError, match=r"cannot be reached.*5 of 6 blocks"):
        windows_for(model, Target(latency=0.3), timer=timer, replacement_module=slow)
    copied = copy.deepcopy(model.model.layers[0])  # takes a slot, and a second a token
    assert windows_for(
        model, Target(latency=ratio), timer=timer, replacement_module=lambda w: copied
    ) == windows_of_size(BLOCKS, 3)


def test_latency_that_cannot_be_reached() -> None:
    model, (_, timer) = charged()
    with pytest.raises(
        StreamlineError,
        match=rf"0.2 of.*5 of 6 blocks.*{(4 + HEAD) / (24 + HEAD):.3f}",
    ):
        windows_for(model, Target(latency=0.2), timer=timer)
    with pytest.raises(StreamlineError, match="2 of 6 blocks"):
        windows_for(model, Target(latency=0.5), timer=timer, protected=frozenset({2, 5}))
    with pytest.raises(StreamlineError, match=r"of 1.*6 is"):
        windows_for(model, Target(latency=0.5), timer=timer, protected=frozenset(range(BLOCKS)))


def noisy_timer(ratios: list[tuple[float, float]], measured: dict[int, list[float]]) -> Any:
    """A timer that gives each number of removed blocks two ratios, and records them."""

    def timer(models: dict[str, Any], **options: Any) -> SpeedReport:
        _, name = models
        count = int(name.split()[1])
        times = {"original": 1.0, name: ratios[count][len(measured.setdefault(count, []))]}
        measured[count].append(times[name])
        return SpeedReport({n: Timing((t,), (), 1, "", "", None) for n, t in times.items()}, 1, 1, 0, 1, "")

    return timer


@given(st.lists(st.tuples(*2 * [st.floats(0.05, 1.3)]), min_size=BLOCKS, max_size=BLOCKS), st.floats(0.1, 0.9))
def test_noise_ends_the_search_and_never_takes_a_number_that_missed(
    ratios: list[tuple[float, float]], wanted: float
) -> None:
    """Whatever the measurements say, the answer was measured twice to reach the target, and one block fewer missed."""
    measured: dict[int, list[float]] = {}
    try:
        found = target_windows(tiny_model("llama"), Target(latency=wanted), timer=noisy_timer(ratios, measured))
    except StreamlineError:
        assert mean(measured[BLOCKS - 1]) > wanted
    else:
        count = len(found.windows[0])
        assert len(measured[count]) == 2 and set(found.predicted.values()) == {mean(measured[count])}
        assert mean(measured[count]) <= wanted < mean(measured.get(count - 1, [1.0]))


def test_a_number_that_reached_the_target_by_chance_is_measured_again() -> None:
    exact = [1 - count / 10 for count in range(BLOCKS)]
    ratios = [(value, value) for value in exact]
    ratios[2] = (0.74, 0.82)
    found = target_windows(tiny_model("llama"), Target(latency=0.75), timer=noisy_timer(ratios, {}))
    assert list(found.windows) == windows_of_size(BLOCKS, 3)
    assert found.predicted == pytest.approx(dict.fromkeys(found.windows, 0.7))


def test_of_windows_that_differ_the_one_that_saves_least_is_timed() -> None:
    model = tiny_of_type("deepseek_v3", blocks=6)
    left = []

    def timer(models: dict[str, Any], **options: Any) -> SpeedReport:
        with models[list(models)[1]]() as shorter:
            left.append(sum(p.numel() for p in shorter.parameters()))
        return SpeedReport({n: Timing((1.0,), (), 1, "", "", None) for n in models}, 1, 1, 0, 1, "")

    _, _, counts = counted("dense beside experts")
    with pytest.raises(StreamlineError, match="cannot be reached"):
        windows_for(model, Target(latency=0.2), timer=timer)
    assert left[-1] == max(n for window, n in counts.items() if len(window) == 5)


def test_blocks_that_cannot_go_cannot_be_timed() -> None:
    with pytest.raises(UnsupportedSurgery, match=r"3 blocks.*no window of this length"):
        windows_for(tiny_of_type("zamba2", blocks=6), Target(latency=0.5))
