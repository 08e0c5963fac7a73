"""A model that has had a surgery, given to everything else: what stands in it already is run once, kept and counted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, compress, find_stack, load, save
from streamline_hooks.checkpoint import BlockwisePass, read_plans
from streamline_hooks.cli import parse_healing
from streamline_hooks.core import UnsupportedSurgery
from streamline_hooks.distillation import DistillationConfig
from streamline_hooks.repair import BlockConfig, FoldedConfig, fit_branch_linear, fit_windows, insert_replacement
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.selection import block_saliency, score_windows
from streamline_hooks.surgery.splice import AFTER, BEFORE, spliced
from streamline_hooks.testing import tiny_model
from tests.configured import arguments, configured

QUICK = DistillationConfig(epochs=2, learning_rate=3e-3, validations=2)


def texts(seed: int, count: int, rows: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (rows, 12), generator=generator) for _ in range(count)]


PARTS: dict[str, Any] = {"calibration": texts(0, 12), "validation": texts(1, 1), "test": texts(2, 1)}
(BATCH,) = PARTS["validation"]


def linear(seed: int = 0) -> LinearReplacement:
    module = LinearReplacement(32)
    with torch.no_grad():
        module.projection.weight.copy_(0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)))
    return module


def operated(*gone: range, blocks: int = 8) -> Any:
    """A model in which linear maps stand in the place of windows."""
    model: Any = tiny_model("llama", blocks=blocks)
    with LayerSurgeon(model) as surgeon:
        for seed, window in enumerate(gone):
            surgeon.replace(window, linear(seed))
        surgeon.commit()
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(BATCH).logits
    return found


def kl(model: Any, original: Tensor) -> float:
    before, after = (one.double().log_softmax(-1) for one in (original, logits(model)))
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("which", ["itself", "a copy"])
@pytest.mark.parametrize("k", [0, 3, 5])
def test_a_block_that_is_exchanged_keeps_what_stands_beside_it(which: str, k: int) -> None:
    model = operated(range(0, 1), range(7, 8))
    expected = logits(model)
    with LayerSurgeon(model) as surgeon:
        block = surgeon.stack[k]
        if which == "itself":
            surgeon.replace([k], block)
        else:
            surgeon.exchange(k, copy.deepcopy(block))
        assert torch.equal(logits(model), expected)
        assert spliced(find_stack(model)[5], AFTER)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(4, 6))
        assert not spliced(find_stack(model)[3], AFTER), "a window that goes takes it along"
    assert torch.equal(logits(model), expected)


def test_a_window_before_it_leaves_what_stands_at_the_end() -> None:
    """Also after a window at the start, and one that ends where the last block begins."""
    model = operated(range(7, 8))
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        surgeon.remove(range(3, 6))
        last = find_stack(model)[-1]
        assert last is surgeon.stack[6] and [type(m) for m in spliced(last, AFTER)] == [LinearReplacement]
        assert surgeon.plan.dropped == ()
        surgeon.commit()
    assert len(spliced(find_stack(model)[-1], AFTER)) == 1


def test_only_a_block_is_exchanged() -> None:
    with (
        LayerSurgeon(tiny_model("llama")) as surgeon,
        pytest.raises(StreamlineError, match=r"LinearReplacement.*block 2"),
    ):
        surgeon.exchange(2, linear())


def test_a_block_that_shares_parameters_is_not_exchanged() -> None:
    model: Any = tiny_model("llama")
    model.model.layers[3].mlp = model.model.layers[2].mlp
    with (
        LayerSurgeon(model, probe=False) as surgeon,
        pytest.raises(UnsupportedSurgery, match=r"Block 3.*LlamaForCausalLM.*blocks 2.*3 share"),
    ):
        surgeon.exchange(3, copy.deepcopy(surgeon.stack[3]))


@pytest.mark.sample(1)
@pytest.mark.parametrize("healing", ["lora:rank=2", "partial:where=last,count=2", "partial:where=beside,count=1"])
def test_what_a_healed_last_block_comes_to_is_told_of_the_model_that_is_returned(healing: str) -> None:
    if healing.startswith("lora"):
        pytest.importorskip("peft")
    model = operated(range(7, 9), blocks=9)
    original = logits(model)
    result = compress(
        model,
        PARTS,
        configured(
            remove=2,
            protect=[0, 1, 4, 5, 6],
            distillation=QUICK,
            healing=parse_healing(healing),
            speed=False,
            generation=False,
        ),
    )
    assert result.training is not None
    assert result.training.distance == pytest.approx(kl(model, original), rel=1e-3)


class Wide(LinearReplacement):
    """Computes in its own precision, whatever comes in, as adapters do."""

    def forward(self, state: Tensor) -> Tensor:
        return super().forward(state.to(self.projection.weight.dtype)).to(state.dtype)


@pytest.mark.parametrize("what", ["opened and left", "scored"])
def test_what_was_spliced_in_keeps_its_precision(what: str) -> None:
    """Its blocks are in bfloat16, and it is not, as adapters are not: to the bit."""
    model: Any = tiny_model("llama").bfloat16()
    with LayerSurgeon(model) as surgeon:
        placed = [surgeon.replace(window, Wide(32)) for window in (range(0, 1), range(3, 5))]
        surgeon.commit()
    for module in placed:
        assert module is not None
        nn.init.normal_(module.float().projection.weight, std=0.1)
    before = copy.deepcopy(model.state_dict())
    if what == "scored":
        score_windows("kl", [range(2, 4), range(0, 1)], model=model, batches=[BATCH])
    else:
        with LayerSurgeon(model) as surgeon:
            surgeon.remove(range(0, 2))
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name


@pytest.mark.long
@pytest.mark.parametrize("healing", ["lora:rank=4", "partial:where=all,learning_rate_ratio=0.1"])
def test_a_zeroed_branch_stays_zero_where_its_block_is_healed(healing: str) -> None:
    if healing.startswith("lora"):
        pytest.importorskip("peft")
    model: Any = tiny_model("llama", blocks=9)
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(1, "attention")
        surgeon.commit()
    parts, slow = {**PARTS, "calibration": texts(0, 64)}, DistillationConfig(learning_rate=1e-3, validations=8)
    result = compress(
        model,
        parts,
        configured(
            remove=2, protect=[0, 1], distillation=slow, healing=parse_healing(healing), speed=False, generation=False
        ),
    )
    assert result.training is not None and result.training.best_step
    block, before = find_stack(model)[1], find_stack(tiny_model("llama", blocks=9))[1]
    assert not block.self_attn.o_proj.weight.any()
    assert not torch.equal(block.mlp.down_proj.weight, before.mlp.down_proj.weight)


def test_zeroed_branches_are_not_selected_again() -> None:
    model: Any = tiny_model("llama")
    options: dict[str, Any] = {
        "search": "attention",
        "remove": 2,
        "repair": "none",
        "speed": False,
        "generation": False,
    }
    first, second = (
        {k for k, _ in compress(model, PARTS, **arguments(**options)).candidates[0].zeroed} for _ in range(2)
    )
    assert len(first | second) == 4
    with pytest.raises(StreamlineError, match=r"5 attention.*4 are available"):
        compress(model, PARTS, **arguments(**{**options, "remove": 5}))


def test_nothing_is_folded_in_front_of_a_splice() -> None:
    model = operated(range(2, 4))
    with pytest.raises(UnsupportedSurgery, match=r"block 1.*earlier surgery"):
        fit_windows(model, [range(2, 4)], FoldedConfig(), [BATCH], texts(3, 1))
    (repair,) = fit_windows(model, [range(3, 5)], FoldedConfig(), [BATCH], texts(3, 1))
    assert repair.repaired_error < repair.removal_error


@pytest.mark.parametrize("gone", [range(2, 4), range(1, 2), range(3, 5), range(7, 8)], ids=str)
def test_inherited_blocks_are_fitted_with_what_stays_between_them(gone: range) -> None:
    """The error that is told, of blocks as they are, is that of the model in which they stand."""
    model, held_out = operated(gone, blocks=9), texts(5, 1, rows=16)
    (repair,) = fit_windows(model, [range(1, 5)], BlockConfig(count=2, solve=False), texts(4, 1, rows=16), held_out)
    with torch.no_grad(), HiddenStateRecorder(model, [4]) as record:
        model(held_out[0])
    with torch.no_grad(), LayerSurgeon(model, probe=False) as surgeon:
        insert_replacement(surgeon, range(1, 5), repair.replacement_module)
        with HiddenStateRecorder(model, [2]) as stood:
            model(held_out[0])
    wanted, found = record.outputs[4][0].double(), stood.outputs[2][0].double()
    error = ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    assert repair.repaired_error == pytest.approx(float(error), rel=1e-4)


def test_a_branch_before_a_splice_has_no_map_and_another_one_is_chosen() -> None:
    model = operated(range(3, 5))
    with pytest.raises(UnsupportedSurgery, match=r"mlp of block 2.*a Li"):
        fit_branch_linear(model, [(2, "mlp")], [BATCH], texts(3, 1))
    with pytest.raises(UnsupportedSurgery, match="mlp of block 5"):
        fit_branch_linear(operated(range(6, 8)), [(5, "mlp")], [BATCH], texts(3, 1))
    original = logits(model)
    result = compress(
        model,
        PARTS,
        configured(search="mlp", remove=1, repair="linear", shortlist=6, speed=False, generation=False, protect=[4]),
    )
    best, *others = result.candidates
    assert best.zeroed[0][0] != 2 and any(one.zeroed[0][0] == 2 and one.refused for one in others)
    assert best.distance == pytest.approx(kl(model, original), rel=1e-3)


def test_one_module_of_two_surgeries_stands_there_twice_as_two(tmp_path: Path) -> None:
    model, module = tiny_model("llama"), linear()
    for window in (range(6, 8), range(2, 4)):
        with LayerSurgeon(model) as surgeon:
            surgeon.replace(window, module)
            surgeon.commit()
    stack = find_stack(model)
    (first,), (second,) = spliced(stack[2], BEFORE), spliced(stack[3], AFTER)
    assert first is not second and torch.equal(first.projection.weight, second.projection.weight)
    save(model, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_a_plan_of_two_says_what_each_module_stands_for() -> None:
    model: Any = tiny_model("llama")
    for window in (range(2, 4), range(0, 2)):
        with LayerSurgeon(model) as surgeon:
            surgeon.replace(window, linear())
            surgeon.commit()
    first, second = read_plans(model)
    both = second.after(first)
    assert [one.replaces for one in both.splices] == [(0, 2), None]


def test_the_gradients_of_what_stays_are_not_a_block_s() -> None:
    model = operated(range(2, 4))
    found = block_saliency(model, [BATCH], [2])[2]
    said = model(BATCH).logits[:, :-1].log_softmax(-1)
    (-said.gather(-1, BATCH[:, 1:, None]).mean()).backward()
    block = find_stack(model)[2]
    sums = {
        name: float((p.detach() * p.grad).abs().sum()) for name, p in block.named_parameters() if p.grad is not None
    }
    beside = sum(value for name, value in sums.items() if name.startswith(BEFORE))
    assert beside > 0 and found == pytest.approx(sum(sums.values()) - beside, rel=1e-4)


@pytest.mark.parametrize("window", [range(0, 2), range(2, 4), range(6, 8)])
def test_blocks_with_modules_between_them_are_run_one_by_one(window: range) -> None:
    model = operated(window)
    with HiddenStateRecorder(model) as record:
        model(BATCH)
    with BlockwisePass(model, [BATCH], check=True) as states:
        for boundary in states:
            if boundary:
                assert torch.equal(states.read(boundary, 0), record.outputs[boundary - 1][0])
            if boundary < len(record.inputs):
                torch.testing.assert_close(
                    states.entering(boundary, 0), record.inputs[boundary][0], rtol=1e-5, atol=1e-6
                )


@pytest.mark.parametrize("change", ["insert", "remove"])
def test_a_second_surgery_of_the_model_without_its_head_is_saved_with_both(change: str, tmp_path: Path) -> None:
    """Its stack has another path there, by which the first surgery's modules are not another stack's."""
    from transformers import AutoModel

    save(operated(range(3, 5)), tmp_path / "first")
    model = AutoModel.from_pretrained(tmp_path / "first")
    with LayerSurgeon(model) as surgeon:
        if change == "insert":
            surgeon.insert(3, linear(7))
        else:
            surgeon.remove([1])
        surgeon.commit()
    save(model, tmp_path / "second")
    loaded = AutoModel.from_pretrained(tmp_path / "second")
    with torch.no_grad():
        assert torch.equal(loaded(BATCH).last_hidden_state, model(BATCH).last_hidden_state)
    numbers = {(entry["block"], len(entry["modules"])) for entry in loaded.config.streamline_hooks["splices"]}
    assert numbers == ({(3, 2)} if change == "insert" else {(2, 1)})


def test_a_surgery_of_the_part_that_has_the_blocks_is_taken_over_by_one_of_the_whole(tmp_path: Path) -> None:
    model: Any = tiny_model("llama", blocks=6)
    with LayerSurgeon(model.model) as surgeon:
        surgeon.replace(range(1, 3), linear())
        surgeon.commit()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        surgeon.commit()
    save(model, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved")(BATCH).logits, model(BATCH).logits)
    assert [entry["block"] for entry in model.config.streamline_hooks["splices"]] == [0]


def test_a_plan_says_what_of_an_earlier_surgery_went_with_a_window() -> None:
    model = operated(range(6, 8))
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        assert surgeon.plan.dropped == ()
        surgeon.remove([5])
        assert surgeon.plan.dropped == ("LinearReplacement",)
        assert str(surgeon.plan).endswith("removed: 0, 5\nremoved splices of an earlier surgery: LinearReplacement")
        plan = surgeon.commit()
    assert read_plans(model)[-1] == plan and plan.after(read_plans(model)[0]).dropped == plan.dropped
