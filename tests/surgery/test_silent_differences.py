"""Surgeries whose result would differ from the model without a message: each is refused or equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from transformers import CompileConfig

from streamline_hooks import (
    HiddenStateRecorder,
    LayerSurgeon,
    StreamlineError,
    UnsupportedSurgery,
    find_stack,
    load,
    save,
)
from streamline_hooks.recording import Intervention, Scale
from streamline_hooks.repair import BlockConfig, fit_windows, insert_replacement
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery import resume
from streamline_hooks.testing import causal_model_types, tiny_inputs, tiny_model
from tests.tiny_models import tokens

# Blocks compute with their index, or get more than the state. Older versions of Transformers do not have these types.
DEPENDENT = sorted({"beam", "inkling2_text", "zaya"}.intersection(causal_model_types()))


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_block_in_place_of_a_window_is_verified(name: str) -> None:
    model: Any = tiny_model(name)
    with LayerSurgeon(model) as surgeon, pytest.raises(UnsupportedSurgery, match="cannot be removed"):
        surgeon.replace(range(2, 5), copy.deepcopy(surgeon.stack[2]))
    with LayerSurgeon(model) as surgeon:  # no other block moves
        surgeon.replace(range(2, 3), copy.deepcopy(surgeon.stack[2]))


def test_a_block_in_place_of_a_window_of_other_models_equals_the_bypassed_one() -> None:
    model: Any = tiny_model("minimax")
    ids = tokens(2, 9)
    with torch.no_grad(), LayerSurgeon(model) as surgeon:
        surgeon.replace(range(2, 5), copy.deepcopy(surgeon.stack[2]))
        replaced = model(ids).logits
    with torch.no_grad(), LayerSurgeon(model) as surgeon:
        surgeon.remove(range(3, 5))
        torch.testing.assert_close(replaced, model(ids).logits)


@pytest.mark.parametrize("name", DEPENDENT)
def test_an_inserted_block_is_verified(name: str) -> None:
    model: Any = tiny_model(name)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
    with LayerSurgeon(model) as surgeon:
        with pytest.raises(UnsupportedSurgery, match="No module can take a slot before block 2"):
            surgeon.insert(2, copy.deepcopy(surgeon.stack[2]))
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected, msg="a refused insertion changed the model")
        surgeon.insert(2, copy.deepcopy(surgeon.stack[2]), despite_hazards=True)


def test_inserted_blocks_with_the_function_of_others_are_accepted() -> None:
    model: Any = tiny_model("llama")
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
    with torch.no_grad(), LayerSurgeon(model) as surgeon:
        for k in (0, 2, len(surgeon.stack)):
            added: Any = surgeon.insert(k, copy.deepcopy(surgeon.stack[2]))
            assert "forward" not in vars(added)
            added.mlp.down_proj.weight.zero_()
            added.self_attn.o_proj.weight.zero_()
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("name", DEPENDENT)
def test_models_that_need_earlier_blocks_are_not_resumed(name: str) -> None:
    model: Any = tiny_model(name)
    inputs = tiny_inputs(model)
    with torch.no_grad(), HiddenStateRecorder(model, [4]) as record:
        model(**inputs)
    with pytest.raises(UnsupportedSurgery, match="cannot be resumed at block 4"):
        resume(model, 4, record.inputs[4][0], inputs)


def test_a_resumed_model_is_compared_once_for_each_block() -> None:
    model: Any = tiny_model("llama")
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    inputs = {"input_ids": tokens(2, 9)}
    with torch.no_grad(), HiddenStateRecorder(model, [4, 5]) as record:
        model(**inputs)
    counts = []
    for k in (4, 4, 5, 4):
        calls.clear()
        with torch.no_grad():
            resume(model, k, record.inputs[k][0], inputs)
        counts.append(len(calls))
    assert counts == [1, 1, 1, 1]  # the hooks of users do not run in the comparison


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs).logits


def test_a_model_in_another_module_is_verified() -> None:
    model: Any = Wrapped(tiny_model("llama"))
    blocks = model.inner.model.layers
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        surgeon.zero_branch(3, "mlp")
        assert not surgeon.stack[3].mlp.down_proj.weight.any()
    forward = type(blocks[3]).forward

    def shifted(self: Any, state: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute with the index of the block."""
        return forward(self, state, *args, **kwargs) * (1.0 + self.self_attn.layer_idx)

    kind = type("Shifted", (type(blocks[3]),), {"forward": shifted})
    for block in blocks:
        block.__class__ = kind
    with LayerSurgeon(model) as surgeon:
        with pytest.raises(UnsupportedSurgery, match="compute with their own index"):
            surgeon.remove([2])
        with pytest.raises(UnsupportedSurgery, match="gives other logits than before: blocks compute with their own"):
            surgeon.insert(2, copy.deepcopy(surgeon.stack[2]))


class NumberedBlock(nn.Module):
    def __init__(self, place: int) -> None:
        super().__init__()
        self.linear, self.place = nn.Linear(4, 4), place

    def forward(self, state: Tensor) -> Tensor:
        return state + self.linear(state) * self.place


class Numbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(NumberedBlock(k) for k in range(5))

    def forward(self, state: Tensor) -> Tensor:
        for block in self.blocks:
            state = block(state)
        return state


OPERATIONS: dict[str, Callable[[LayerSurgeon], object]] = {
    "remove": lambda surgeon: surgeon.remove(range(1, 3)),
    "replace": lambda surgeon: surgeon.replace(range(1, 3), nn.Linear(4, 4)),
    "insert": lambda surgeon: surgeon.insert(2, NumberedBlock(2)),
    "check": lambda surgeon: surgeon.check(range(1, 3)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_renumbering_that_no_run_verifies_is_announced_where_it_is_called(operation: str) -> None:
    with (
        LayerSurgeon(Numbered()) as surgeon,
        pytest.warns(UserWarning, match=r"attribute 'place' .*renumbered") as told,
    ):
        OPERATIONS[operation](surgeon)
    assert [warning.filename for warning in told] == [__file__]


def composite() -> Any:
    return tiny_model("gemma3")


def change(model: nn.Module) -> None:
    with LayerSurgeon(model) as surgeon:
        module = LinearReplacement(find_stack(model).config.hidden_size)  # type: ignore[union-attr]
        nn.init.normal_(module.projection.weight, std=0.3)
        surgeon.replace(range(2, 4), module)
        surgeon.commit()


@pytest.mark.parametrize("write", ["save_pretrained", "save"])
def test_a_model_around_a_committed_part_is_not_saved_without_its_splices(write: str, tmp_path: Path) -> None:
    model = composite()
    part = model.model.language_model
    change(part)
    with pytest.raises(StreamlineError, match=r"inside this Gemma3\w+ has spliced modules.*LayerSurgeon on it"):
        model.save_pretrained(tmp_path) if write == "save_pretrained" else save(model, tmp_path / "out")
    assert model.state_dict().keys() > {"model.language_model.norm.weight"}
    part.save_pretrained(tmp_path / "part")
    loaded = load(tmp_path / "part")
    states = torch.randn(1, 5, part.config.hidden_size)
    with torch.no_grad():
        expected = part(inputs_embeds=states).last_hidden_state
        torch.testing.assert_close(loaded(inputs_embeds=states).last_hidden_state, expected)


def test_a_part_of_a_committed_model_is_not_saved_without_its_splices(tmp_path: Path) -> None:
    model = composite()
    change(model)
    copied = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "whole")
    for changed in (model, copied, load(tmp_path / "whole")):
        with pytest.raises(StreamlineError, match="Save the whole model"):
            changed.model.language_model.save_pretrained(tmp_path / "part")
    change(model)  # a second surgery
    with pytest.raises(StreamlineError, match="Save the whole model"):
        model.model.language_model.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_a_part_of_a_model_without_splices_is_saved(tmp_path: Path) -> None:
    model = composite()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        surgeon.commit()
    model.model.language_model.save_pretrained(tmp_path)
    assert load(tmp_path).config.num_hidden_layers == model.config.text_config.num_hidden_layers


def test_a_copied_model_generates_with_its_own_blocks() -> None:
    """Transformers keeps the compiled forward of the original in the copy."""
    model: Any = tiny_model("llama")
    ids = tokens(1, 5)
    options: dict[str, Any] = {
        "cache_implementation": "static",
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "compile_config": CompileConfig(backend="eager", fullgraph=False),
    }
    model.get_compiled_call(options["compile_config"])
    changed = copy.deepcopy(model)
    assert "_compiled_call" in vars(changed)
    with LayerSurgeon(changed) as surgeon:
        surgeon.zero_branch(3, "mlp")
        surgeon.commit()
    assert "_compiled_call" not in vars(changed)
    compiled = changed.get_compiled_call(options["compile_config"])
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, changed(ids).logits)
        assert not torch.allclose(compiled(ids).logits, model(ids).logits, atol=1e-3)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def randomized_map(seed: int) -> LinearReplacement:
    module = LinearReplacement(32)
    nn.init.normal_(module.projection.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    return module


def test_a_function_compiled_before_a_repair_runs_the_repair(fresh_compiler: None) -> None:
    """TorchDynamo does not notice hooks, so the graph of the model with as many blocks would be run again."""
    model: Any = tiny_model("llama").eval()
    ids = tokens(1, 9)
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="eager")

    def compare() -> Tensor:
        logits: Tensor = compiled(ids)
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits)
        return logits

    with torch.no_grad():
        full = compare()
        with LayerSurgeon(model) as surgeon:
            surgeon.remove([2, 3])
            removed = compare()
        with LayerSurgeon(model) as surgeon:
            surgeon.replace([2, 3], randomized_map(0))
            assert not torch.allclose(compare(), removed, atol=0.1)
        with LayerSurgeon(model) as surgeon:
            surgeon.insert(4, randomized_map(1))
            assert not torch.allclose(compare(), full, atol=0.1)
        torch.testing.assert_close(compare(), full)
        with LayerSurgeon(model) as surgeon:
            surgeon.insert(4, randomized_map(1))
            surgeon.commit()
        committed = compare()
        assert not torch.allclose(committed, full, atol=0.1)
        with LayerSurgeon(model) as surgeon:
            surgeon.insert(4, randomized_map(2))
            assert not torch.allclose(compare(), committed, atol=0.1)
        torch.testing.assert_close(compare(), committed)


def test_a_function_compiled_before_an_intervention_runs_the_edits(fresh_compiler: None) -> None:
    model: Any = tiny_model("llama").eval()
    ids = tokens(1, 9)
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="eager")
    with torch.no_grad():
        before = compiled(ids)
        with Intervention(model, {("block.output", 2): Scale(0.3)}):
            expected = model(ids, use_cache=False).logits
            torch.testing.assert_close(compiled(ids), expected)
        torch.testing.assert_close(compiled(ids), before)
    assert not torch.allclose(expected, before, atol=0.1)


def test_a_copied_block_keeps_the_settings_of_its_original_after_another_surgery() -> None:
    model: Any = tiny_model("gemma3_text")
    batches = [tokens(2, 12, seed=k) for k in range(3)]
    (fitted,) = fit_windows(model, [range(5, 7)], BlockConfig(solve=False), batches, batches)
    (lost,) = fit_windows(model, [range(0, 2)], BlockConfig(solve=False), batches, batches)
    kind = model.config.layer_types[5]
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(0, 2))
        surgeon.commit()
    assert model.config.layer_types[5] != kind  # what the index of the copy would give
    with LayerSurgeon(model) as surgeon:
        insert_replacement(surgeon, range(3, 5), fitted.replacement_module)
        assert model.config.layer_types[3] == kind
    with LayerSurgeon(model) as surgeon, pytest.raises(StreamlineError, match="copied from a block that was removed"):
        insert_replacement(surgeon, range(3, 5), lost.replacement_module)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, state: Tensor) -> Tensor:
        result: Tensor = state + self.second(self.first(state).tanh())
        return result


class OnTheHub(nn.Module, PyTorchModelHubMixin):  # type: ignore[misc]
    """A module of its own that has `save_pretrained`, but is no model of Transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, state: Tensor) -> Tensor:
        for block in self.blocks:
            state = block(state)
        return state


def test_a_module_of_the_hub_is_a_module_of_its_own(tmp_path: Path) -> None:
    model, state = OnTheHub(), torch.randn(2, 3, 8)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2, 3])
        surgeon.commit()
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out", into=OnTheHub())
    assert len(loaded.blocks) == 4
    torch.testing.assert_close(loaded(state), model(state))


def test_a_new_block_is_matched_to_its_neighbor() -> None:
    model: Any = tiny_model("llama")
    model.model.layers[0].double()
    with LayerSurgeon(model, probe=False) as surgeon:
        block = surgeon.replace(range(3, 5), copy.deepcopy(surgeon.stack[3]))
        assert block is not None and {p.dtype for p in block.parameters()} == {torch.float32}
