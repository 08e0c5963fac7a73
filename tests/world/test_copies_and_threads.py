"""Copies, pickles and shared models: nothing writes into another one's recorder."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, find_stack, load, save
from streamline_hooks.replacements import LinearReplacement
from tests.tiny_models import BLOCKS, WIDTH, Nudge, tiny_model, tokens


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, pickled, through_torch_save]
copies = pytest.mark.parametrize("duplicated", COPIES)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(2, 7), use_cache=False).logits


@copies
def test_a_copy_made_inside_a_recorder_does_not_write_into_it(duplicated: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_model("llama")
    with HiddenStateRecorder(model, stop=True) as record:
        record(input_ids=tokens(1, 4))
        duplicate = duplicated(model)
        assert torch.equal(logits(duplicate), logits(tiny_model("llama")))  # and is not stopped
    logits(duplicate)
    assert [len(visits) for visits in record.inputs.values()] == [1] * BLOCKS


@copies
def test_a_copy_can_be_recorded_itself(duplicated: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_model("llama")
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        duplicate = duplicated(model)
        with HiddenStateRecorder(duplicate) as other:
            duplicate(tokens(2, 7))
            model(tokens(2, 7))
    for k in range(BLOCKS):
        assert len(record.outputs[k]) == len(other.outputs[k]) == 1
        assert torch.equal(record.outputs[k][0], other.outputs[k][0])
        assert record.outputs[k][0] is not other.outputs[k][0]


def test_a_shallow_copy_shares_the_blocks_and_so_the_recorder() -> None:
    """The blocks are the same modules, so what they get is recorded; the new outer module is not the watched one."""
    model = tiny_model("llama")
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        copy.copy(model)(tokens(2, 7))
    assert [len(visits) for visits in record.inputs.values()] == [1] * BLOCKS
    logits(model)
    assert [len(visits) for visits in record.inputs.values()] == [1] * BLOCKS


@copies
def test_a_copy_does_not_keep_the_recorder_alive(duplicated: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_model("llama")
    record = HiddenStateRecorder(model)
    with record:
        logits(model)
        duplicate = duplicated(model)
    states = weakref.ref(record.inputs[0][0])
    del record
    gc.collect()
    assert states() is None and isinstance(duplicate, nn.Module)


@copies
def test_a_copy_made_inside_a_surgeon_runs_its_own_splice(duplicated: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_model("llama")
    original = logits(model)
    with LayerSurgeon(model) as surgeon:
        nudge = surgeon.replace(range(1, 3), Nudge())
        duplicate, expected = duplicated(model), logits(model)
        nn.init.zeros_(nudge.weight)
        assert torch.equal(logits(duplicate), expected) and not torch.equal(logits(model), expected)
    assert torch.equal(logits(duplicate), expected) and torch.equal(logits(model), original)
    assert duplicate.config.num_hidden_layers == BLOCKS - 2 and model.config.num_hidden_layers == BLOCKS


@copies
def test_a_copy_made_inside_a_surgeon_is_saved_after_its_own_commit(
    duplicated: Callable[[nn.Module], nn.Module], tmp_path: object
) -> None:
    model, generator = tiny_model("llama"), torch.Generator().manual_seed(1)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1, 2], LinearReplacement.from_map(0.1 * torch.randn(WIDTH, WIDTH, generator=generator)))
        duplicate = duplicated(model)
        again = duplicated(duplicate)
        with pytest.raises(StreamlineError, match="exit restores the original"):
            model.save_pretrained(tmp_path)
    for one in (duplicate, again):
        with pytest.raises(StreamlineError, match="copied inside an open LayerSurgeon"):
            one.save_pretrained(tmp_path)
    with LayerSurgeon(duplicate) as surgeon:
        surgeon.commit()
    save(duplicate, tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(duplicate))
    assert not any("_streamline_hooks_origin" in vars(block) for block in find_stack(duplicate).blocks)


@copies
def test_a_committed_model_is_copied(duplicated: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1, 2], Nudge())
        surgeon.insert(BLOCKS, Nudge(seed=1))
        surgeon.commit()
    duplicate = duplicated(model)
    assert type(duplicate) is type(model) and torch.equal(logits(duplicate), logits(model))


def test_two_recorders_on_two_models_in_two_threads() -> None:
    start = Barrier(2, timeout=60)

    def work(seed: int) -> tuple[HiddenStateRecorder, list[torch.Tensor]]:
        model, expected = tiny_model("llama"), []
        model.model.embed_tokens.weight.data.mul_(seed + 1)
        with torch.no_grad(), HiddenStateRecorder(model) as record:
            start.wait()
            for visit in range(8):
                given = tokens(2, 5 + visit, seed)
                expected.append(model.model.embed_tokens(given))
                record(input_ids=given)
        return record, expected

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(2)))
    for record, expected in results:
        assert [len(visits) for visits in record.inputs.values()] == [8] * BLOCKS
        for state, embedded in zip(record.inputs[0], expected, strict=True):
            assert torch.equal(state, embedded)


def test_two_surgeons_on_two_models_in_two_threads() -> None:
    start, models = Barrier(2, timeout=60), [tiny_model("llama"), tiny_model("llama")]

    def work(which: int) -> torch.Tensor:
        with LayerSurgeon(models[which]) as surgeon:
            start.wait()
            for _ in range(4):
                logits(models[which])
            surgeon.replace([1 + which], Nudge(seed=which))
            changed = logits(models[which])
            start.wait()
        return changed

    with ThreadPoolExecutor(2) as pool:
        changed = list(pool.map(work, range(2)))
    for which in range(2):
        alone = tiny_model("llama")
        with LayerSurgeon(alone) as surgeon:
            surgeon.replace([1 + which], Nudge(seed=which))
            assert torch.equal(logits(alone), changed[which])
        assert torch.equal(logits(models[which]), logits(tiny_model("llama")))


def test_a_backward_in_one_thread_hides_no_visit_of_another() -> None:
    """Recomputation is told by the thread that runs the backward."""
    model, inside, done = tiny_model("llama"), Barrier(2, timeout=60), Barrier(2, timeout=60)

    def wait_for_the_other(gradient: torch.Tensor) -> None:
        inside.wait()
        done.wait()

    def backward() -> None:
        x = torch.ones(2, requires_grad=True)
        y = x * 2
        y.register_hook(wait_for_the_other)
        y.sum().backward()

    def forward() -> HiddenStateRecorder:
        with torch.no_grad(), HiddenStateRecorder(model) as record:
            inside.wait()
            model(tokens(1, 4))
            done.wait()
        return record

    with ThreadPoolExecutor(2) as pool:
        other, result = pool.submit(backward), pool.submit(forward)
        other.result()
        assert [len(visits) for visits in result.result().inputs.values()] == [1] * BLOCKS
