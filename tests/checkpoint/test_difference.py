"""Which blocks are which, told by the weights and held to the plan."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from streamline_hooks import LayerSurgeon, load, save
from streamline_hooks.checkpoint import BlockMatch, compare_blocks
from streamline_hooks.cli import run
from streamline_hooks.modeling import find_stack
from streamline_hooks.replacements import LinearReplacement
from tests.tiny_models import FAMILIES, WIDTH, tiny_config, tiny_model


def noisy(block: nn.Module, size: float) -> None:
    with torch.no_grad():
        for seed, weight in enumerate(block.parameters()):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight.add_(size * weight.norm() * noise / noise.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_plan_says(family: str, tmp_path: Path) -> None:
    original, model = tiny_model(family), tiny_model(family)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), LinearReplacement(WIDTH))
        plan = surgeon.commit()
    loaded = load(save(model, tmp_path / "model"))
    assert [(m.source, m.changed) for m in compare_blocks(original, loaded)] == [(k, ()) for k in plan.kept]


def test_changed_new_and_equal_ones() -> None:
    original = tiny_model("llama")
    model = copy.deepcopy(original)
    blocks = find_stack(model).blocks
    with torch.no_grad():
        blocks[0].mlp.down_proj.weight.mul_(1.5)
    noisy(blocks[1], 0.05)
    for seed, weight in enumerate(blocks[2].parameters()):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
    found = compare_blocks(original, model)
    assert (found[0].source, found[0].changed) == (0, ("mlp.down_proj.weight",))
    assert found[1].source == 1 and found[1].distance == pytest.approx(0.05, rel=1e-3)
    assert len(found[1].changed) == len(list(blocks[1].parameters()))
    assert (found[2].source, str(found[2])) == (None, "   2 <- none, it is new")
    assert (found[3].source, found[3].changed, found[3].distance) == (3, (), 0.0)


@pytest.mark.parametrize(
    ("changed", "listed"), [("abc", ": a, b, c"), ("abcd", ": a, b, c and 1 more"), ("abcdefg", ": a, b, c and 4 more")]
)
def test_of_many_changed_weights_three_are_named_and_the_others_counted(changed: str, listed: str) -> None:
    assert str(BlockMatch(2, 5, tuple(changed), 0.125)) == f"   2 <- 5, changed by 12.50%{listed}"


def test_another_precision_is_no_change() -> None:
    original, model = tiny_model("llama"), tiny_model("llama", torch.bfloat16)
    with torch.no_grad():
        find_stack(model).blocks[1].mlp.down_proj.weight.mul_(2)
    found = compare_blocks(original, model)
    assert [match.source for match in found] == list(range(len(found)))
    assert [match.changed for match in found[:2]] == [(), ("mlp.down_proj.weight",)]


def test_a_weight_that_only_one_block_has_is_a_change() -> None:
    config = tiny_config("llama", num_hidden_layers=2)
    biases = tuple(f"self_attn.{name}_proj.bias" for name in "koqv")
    plain = transformers.LlamaForCausalLM(config)
    biased = transformers.LlamaForCausalLM(tiny_config("llama", num_hidden_layers=2, attention_bias=True))
    biased.load_state_dict(plain.state_dict(), strict=False)
    for first, second in ((plain, biased), (biased, plain)):
        assert [(m.source, m.changed) for m in compare_blocks(first, second)] == [(0, biases), (1, biases)]


def test_nothing_in_common_is_nothing() -> None:
    """Zeroed branches are alike in every block."""
    original = tiny_model("llama")
    for block in find_stack(original).blocks:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    model = copy.deepcopy(original)
    for seed, (name, weight) in enumerate(find_stack(model).blocks[1].named_parameters()):
        if "o_proj" not in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
    assert compare_blocks(original, model)[1].source is None


def test_equal_blocks_are_told_apart_by_their_order() -> None:
    original = tiny_model("llama")
    blocks = find_stack(original).blocks
    blocks[2].load_state_dict(blocks[1].state_dict())
    assert [match.source for match in compare_blocks(original, copy.deepcopy(original))] == list(range(len(blocks)))


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    save(model, tmp_path / "a")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    save(model, tmp_path / "b")
    run(["diff", str(tmp_path / "a"), str(tmp_path / "b")])
    said = capsys.readouterr().out
    assert "   1 <- 2\n" in said and "of A, not in B: 1\n" in said and "removed: 1" in said
    run(["diff", str(tmp_path / "b"), str(tmp_path / "a")])
    said = capsys.readouterr().out
    assert "   1 <- none, it is new\n" in said and "not in B: none" in said and "no surgery plan" in said
