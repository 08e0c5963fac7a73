"""Threads with separate models do not affect each other, and a model that two threads use at once is refused."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, find_stack, load, profile, save
from streamline_hooks.modeling import inference
from streamline_hooks.recording import ActivationStore
from streamline_hooks.repair import SwiGLUConfig
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model as tiny_of_type
from streamline_hooks.training import HiddenStateMonitor
from tests.tiny_models import BLOCKS, WIDTH, Nudge, left_padded, tiny_model, tokens

SECONDS = 60.0


def both(work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, range(2)))


def logits(model: nn.Module, seed: int = 0) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, 7, seed), use_cache=False).logits


class Paused:
    """Stop a thread inside a forward pass of a model, at a block, until `resume` is called."""

    def __init__(self, model: nn.Module, block: int, work: Callable[[], Any]) -> None:
        self.entered, self._go, self._is_first = Event(), Event(), True
        self._handle = find_stack(model)[block].register_forward_pre_hook(self._wait)
        self._pool = ThreadPoolExecutor(1)
        self._result = self._pool.submit(work)
        assert self.entered.wait(SECONDS)

    def _wait(self, *_: object) -> None:
        if self._is_first:
            self._is_first = False
            self._handle.remove()
            self.entered.set()
            assert self._go.wait(SECONDS)

    def resume(self) -> Any:
        self._go.set()
        try:
            return self._result.result(SECONDS)
        finally:
            self._pool.shutdown()


# Separate models


def test_profiles_stores_and_surgery_of_two_models_in_two_threads(tmp_path: Path) -> None:
    start = Barrier(2, timeout=SECONDS)

    def work(seed: int, folder: Path, wait: Callable[[], object]) -> tuple[Any, ...]:
        model = tiny_model(("llama", "gpt2")[seed]).train()
        batches = [left_padded(3, 9, seed=10 * seed + k) for k in range(4)]
        wait()
        measured = profile(model, batches)
        store = ActivationStore(folder, shard_bytes=2000).record(model, batches, blocks=[1, -1])
        with LayerSurgeon(model) as surgeon:
            surgeon.replace(range(1, 3), Nudge(seed=seed))
            changed = profile(model, batches).value("cosine", range(0, 2))
        assert model.training
        rows = [shard["block.output.1"] for shard in store]
        return measured.value("cosine", range(2, 4)), changed, torch.cat(rows), logits(model.eval(), seed)

    together = both(lambda seed: work(seed, tmp_path / f"together{seed}", start.wait))
    for seed in range(2):
        alone = work(seed, tmp_path / f"alone{seed}", lambda: None)
        assert together[seed][:2] == alone[:2]
        assert torch.equal(together[seed][2], alone[2]) and torch.equal(together[seed][3], alone[3])


def test_seeded_weights_do_not_depend_on_other_threads() -> None:
    """Also, neither the global random states nor the warning filters change."""
    stack, start = find_stack(tiny_model("llama")), Barrier(2, timeout=SECONDS)

    def work(seed: int) -> list[Tensor]:
        start.wait()
        weights = []
        for _ in range(6):
            weights.append(tiny_of_type("llama", seed=seed).lm_head.weight)
            replacement = SwiGLUConfig(seed=seed).build(stack, range(1, 3))
            weights += [parameter.detach() for parameter in replacement.parameters()]
        return weights

    before = torch.get_rng_state(), random.getstate(), list(warnings.filters)
    together = both(work)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert before[2] == list(warnings.filters)
    for seed in range(2):
        alone = [tiny_of_type("llama", seed=seed).lm_head.weight]
        alone += [p.detach() for p in SwiGLUConfig(seed=seed).build(stack, range(1, 3)).parameters()]
        for number, weight in enumerate(together[seed]):
            assert torch.equal(weight, alone[number % len(alone)])


def test_two_threads_commit_models_of_the_same_class(tmp_path: Path) -> None:
    """The class of a model with splices is created once, by the first commit."""
    start = Barrier(2, timeout=SECONDS)

    def work(seed: int) -> nn.Module:
        model = tiny_model("qwen3")
        with LayerSurgeon(model) as surgeon:
            map_ = 0.1 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
            surgeon.replace(range(1, 3), LinearReplacement.from_map(map_))
            start.wait()
            surgeon.commit()
        return model

    first, second = both(work)
    assert type(first) is type(second) and type(first.config) is type(second.config)
    for number, model in enumerate((first, second)):
        save(model, tmp_path / str(number))
        loaded = load(tmp_path / str(number))
        assert type(loaded) is type(model) and torch.equal(logits(loaded), logits(model))


# One model


@pytest.mark.parametrize("block", [0, 2])
def test_a_forward_that_overlaps_a_recorded_one_is_refused(block: int) -> None:
    model = tiny_model("llama")
    expected = logits(tiny_model("llama"))
    with HiddenStateRecorder(model) as record:
        paused = Paused(model, block, lambda: logits(model))
        for call in (lambda: logits(model), lambda: model.model(tokens(1, 3))):
            with pytest.raises(StreamlineError, match="another thread records its hidden states"):
                call()
        assert torch.equal(paused.resume(), expected)
        assert [len(states) for states in record.inputs.values()] == [1] * BLOCKS
        logits(model)  # one after the other is allowed, from any thread
    assert [len(states) for states in record.outputs.values()] == [2] * BLOCKS
    assert torch.equal(record.outputs[3][0], record.outputs[3][1])


def test_generation_in_a_thread_is_recorded_by_the_thread_that_waits() -> None:
    """As with a streamer of Transformers."""
    model = tiny_model("llama")
    options = {"max_new_tokens": 3, "do_sample": False, "min_new_tokens": 3}
    with HiddenStateRecorder(model, [1]) as record, ThreadPoolExecutor(1) as pool:
        pool.submit(model.generate, tokens(1, 4), **options).result(SECONDS)
    with HiddenStateRecorder(model, [1]) as expected:
        model.generate(tokens(1, 4), **options)
    assert len(record.outputs[1]) == 3
    assert all(torch.equal(a, b) for a, b in zip(record.outputs[1], expected.outputs[1], strict=True))


def test_a_monitor_refuses_an_overlapping_step() -> None:
    model = tiny_model("llama")
    with HiddenStateMonitor(model, every=1):
        paused = Paused(model, 1, lambda: logits(model))
        with pytest.raises(StreamlineError, match="another thread records its hidden states"):
            logits(model)
        paused.resume()


def test_between_the_batches_of_a_pass_other_threads_are_refused() -> None:
    model = tiny_model("llama")
    batches = [{"input_ids": tokens(2, 5, seed=k)} for k in range(3)]
    with HiddenStateRecorder(model).over(batches) as recorded, ThreadPoolExecutor(1) as pool:
        for batch, run in zip(batches, recorded, strict=True):
            with pytest.raises(StreamlineError, match="one thread per model"):
                pool.submit(logits, model).result(SECONDS)
            assert torch.equal(run.entering(0), model.model.embed_tokens(batch["input_ids"]))


@pytest.mark.parametrize("use", ["profile", "inference", "surgeon"])
def test_a_model_that_another_thread_profiles_is_refused(use: str) -> None:
    model = tiny_model("llama").train()
    batches = [{"input_ids": tokens(2, 5, seed=k)} for k in range(3)]
    expected = profile(copy.deepcopy(model), batches).value("cosine", range(1, 3))

    def run() -> None:
        if use == "profile":
            profile(model, batches)
        elif use == "inference":
            with inference(model.model):
                pass
        else:
            LayerSurgeon(model).__enter__()

    paused = Paused(model, 2, lambda: profile(model, batches).value("cosine", range(1, 3)))
    with pytest.raises(StreamlineError, match=r"Another thread is running this Llama.*copy.deepcopy"):
        run()
    assert paused.resume() == expected
    assert model.training
    profile(model, batches)


def test_surgery_during_a_pass_of_another_thread_is_refused() -> None:
    model = tiny_model("llama")
    batches = [{"input_ids": tokens(2, 5)}]
    with LayerSurgeon(model) as surgeon:
        paused = Paused(model, 2, lambda: profile(model, batches).value("cosine", range(1, 3)))
        with pytest.raises(StreamlineError, match="Another thread is running"):
            surgeon.remove([1])
        assert paused.resume() == profile(tiny_model("llama"), batches).value("cosine", range(1, 3))
        surgeon.remove([1])
    assert torch.equal(logits(model), logits(tiny_model("llama")))


def test_a_second_surgeon_in_another_thread_is_refused() -> None:
    model = tiny_model("llama")

    def second() -> None:
        with LayerSurgeon(model):
            pass

    with LayerSurgeon(model) as surgeon, ThreadPoolExecutor(1) as pool:
        surgeon.remove([1])
        changed = logits(model)
        with pytest.raises(StreamlineError, match="A LayerSurgeon of another thread is open"):
            pool.submit(second).result(SECONDS)
        assert torch.equal(pool.submit(logits, model).result(SECONDS), changed)  # running the model is allowed
        surgeon.remove([2])
    assert torch.equal(logits(model), logits(tiny_model("llama")))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(second).result(SECONDS)
