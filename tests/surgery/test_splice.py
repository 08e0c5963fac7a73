"""Splices of an earlier surgery, beside what is put in now."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, find_stack
from streamline_hooks.evaluation import distances_of_candidates
from streamline_hooks.modeling import Candidate, Task
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.surgery.splice import AFTER, BEFORE, set_splices, snapshot_splices, spliced
from tests.surgery.interruptions import interrupted_at
from tests.tiny_models import BLOCKS, Nudge, repaired, tiny_model, tokens


def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(2, 9) if ids is None else ids).logits


def with_splices(*places: int) -> nn.Module:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        for place in places:
            surgeon.insert(place, Nudge(seed=place + 10))
        surgeon.commit()
    return model


@pytest.mark.parametrize("window", [range(0, 2), range(1, 4), range(2, 4), range(3, 5), range(3, BLOCKS)])
@pytest.mark.parametrize("module", [None, Nudge(seed=3)], ids=["removed", "replaced"])
def test_what_is_judged_is_what_is_committed(window: range, module: Nudge | None) -> None:
    """Splices before, at, inside and after the window, and at the end of the stack."""
    model = with_splices(0, 2, 3, BLOCKS)
    ids = tokens(2, 9, seed=4)
    reference = logits(model, ids).double().log_softmax(-1)
    kl = distances_of_candidates(model, [ids], [Candidate(window, module)])[0]
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(window, copy.deepcopy(module))
        surgeon.commit()
    changed = logits(model, ids).double().log_softmax(-1)
    expected = (reference.exp() * (reference - changed)).sum(-1).mean().item()
    assert kl == pytest.approx(expected, rel=1e-4)


def test_a_window_stands_for_the_states_that_the_recorder_shows() -> None:
    """From what its first block receives to what its last block hands on."""
    model = with_splices(2, 3, BLOCKS)
    for window in (range(2, 4), range(1, 3), range(4, BLOCKS)):
        with torch.no_grad(), HiddenStateRecorder(model) as record:
            expected = model(tokens(2, 9)).logits

        class Answer(nn.Module):
            def __init__(self, answer: torch.Tensor) -> None:
                super().__init__()
                self.answer = answer

            def forward(self, state: torch.Tensor) -> torch.Tensor:
                return self.answer

        with LayerSurgeon(model) as surgeon:
            surgeon.replace(window, Answer(record.outputs[window.stop - 1][0]))
            torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [0, 2, BLOCKS])
def test_order_is_the_same_in_one_surgeon_and_in_several(k: int) -> None:
    first, second = Nudge(seed=1), Nudge(seed=2)
    one = tiny_model("llama")
    with LayerSurgeon(one) as surgeon:
        surgeon.insert(k, first)
        surgeon.insert(k, second)
        expected = logits(one)
    several = tiny_model("llama")
    with LayerSurgeon(several) as outer:
        outer.insert(k, first)
        with LayerSurgeon(several) as inner:
            inner.insert(k, second)
            assert torch.equal(logits(several), expected)
        outer.commit()
    with LayerSurgeon(several) as surgeon:
        surgeon.insert(k, second)
        assert torch.equal(logits(several), expected)


def test_the_stacks_name_reaches_the_judge() -> None:
    class Two(nn.Module):
        """A language model with a second stack in front, of the same width."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = tiny_model("llama")
            self.front = nn.ModuleList(_Residual() for _ in range(4))

        def forward(self, input_ids: torch.Tensor) -> Any:
            state = self.inner.model.embed_tokens(input_ids)
            for block in self.front:
                state = block(state)
            return self.inner(inputs_embeds=state)

    model, ids = Two().eval(), tokens(2, 9)
    candidates = [Candidate(range(k, k + 2)) for k in range(3)]
    kls = distances_of_candidates(model, [ids], candidates, stack="front", task=Task("causal-lm"))
    for candidate, kl in zip(candidates, kls, strict=True):
        p = logits(model, ids).double().log_softmax(-1)
        with LayerSurgeon(model, "front") as surgeon:
            surgeon.remove(candidate.window)
            q = logits(model, ids).double().log_softmax(-1)
        assert kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(32, 32)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state + self.map(state)


def test_a_block_that_is_copied_leaves_the_splices_beside_it() -> None:
    model = with_splices(2)
    with LayerSurgeon(model) as surgeon:
        added = surgeon.insert(BLOCKS, surgeon.stack[2])
        assert "spliced_before" not in added._modules and not added._forward_pre_hooks


def test_an_offloaded_splice_goes_to_another_block() -> None:
    """Accelerate brings it to where it runs."""
    import accelerate

    expected = with_splices(2)
    with LayerSurgeon(expected) as surgeon:
        surgeon.remove([2])
        surgeon.commit()
    model = accelerate.cpu_offload(with_splices(2), execution_device=torch.device("cpu"))
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        assert [len(spliced(block, BEFORE)) for block in surgeon.stack.container] == [0, 0, 1, 0, 0]
        assert torch.equal(logits(model), logits(expected))


def test_hooks_come_back_in_their_order() -> None:
    model = with_splices(2)
    block = find_stack(model)[2]
    block.register_forward_pre_hook(lambda m, a: None)
    block.register_forward_pre_hook(lambda m, a: None, prepend=True)
    before = list(block._forward_pre_hooks.items()), dict(block._forward_pre_hooks_with_kwargs)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        surgeon.insert(1, Nudge())
    assert (list(block._forward_pre_hooks.items()), dict(block._forward_pre_hooks_with_kwargs)) == before


def test_a_class_derived_from_the_blocks_takes_a_slot() -> None:
    model = tiny_model("gpt2")
    block_class = type(find_stack(model)[0])
    derived = type("Derived", (block_class,), {})(model.config, layer_idx=0).eval()
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(2, derived)
        assert len(surgeon.stack.container) == BLOCKS + 1
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with_cache, without = (model.generate(tokens(1, 5), **options, use_cache=c) for c in (True, False))
        assert torch.equal(with_cache, without)


def test_what_is_put_in_works_in_the_mode_of_the_model() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(2, nn.Dropout(0.5))
        assert torch.equal(logits(model), logits(model))
    noisy = nn.Sequential(Nudge(), nn.Dropout(0.5))
    assert len(set(distances_of_candidates(model, [tokens(1, 5)], [Candidate(range(1, 3), noisy)] * 2))) == 1
    assert noisy.training


def test_names_of_the_blocks_keep_their_form() -> None:
    from collections import OrderedDict

    numbered = nn.Sequential(OrderedDict((f"layer_{k}", _Residual()) for k in range(4)))
    spoken = nn.Sequential(OrderedDict((name, _Residual()) for name in ("a", "b", "c")))
    both = nn.Sequential(OrderedDict((name, _Residual()) for name in ("0", "1", "2", "last")))
    cases = ((numbered, 1, ["layer_0", "layer_1", "layer_2"]), (spoken, 0, ["b", "c"]), (both, 1, ["0", "2", "last"]))
    for stack, gone, names in cases:
        holder = nn.Module()
        holder.stack = stack
        before = list(holder.state_dict())
        with LayerSurgeon(holder) as surgeon:
            surgeon.remove([gone])
            assert list(dict(stack.named_children())) == names
        assert list(holder.state_dict()) == before


def test_a_copy_made_inside_is_saved_after_a_commit_of_its_own(tmp_path: Any) -> None:
    from streamline_hooks import load, save
    from streamline_hooks.replacements import LinearReplacement

    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1, 2], LinearReplacement.from_map(0.1 * torch.randn(32, 32)))
        duplicate = copy.deepcopy(model)
    with pytest.raises(StreamlineError, match="copied inside an open LayerSurgeon"):
        duplicate.save_pretrained(tmp_path / "copy")
    with LayerSurgeon(duplicate) as surgeon:
        surgeon.commit()
    save(duplicate, tmp_path / "copy")
    assert torch.equal(logits(load(tmp_path / "copy")), logits(duplicate))
    assert not any("_streamline_hooks_origin" in vars(b) for b in find_stack(duplicate).blocks)


@pytest.mark.parametrize("place", [BEFORE, AFTER])
@pytest.mark.parametrize(("held", "present"), [(1, 0), (0, 1), (1, 2)])
def test_splices_come_back_when_interrupted_at_any_line(place: Any, held: int, present: int) -> None:
    line, reached = 0, True
    while reached:
        line += 1
        block = _Residual()
        block.register_forward_pre_hook(lambda m, a: None)
        set_splices(block, place, [nn.Identity() for _ in range(held)])
        set_splices(block, AFTER if place == BEFORE else BEFORE, [nn.Identity()])
        tables = block._modules, block._forward_pre_hooks, block._forward_pre_hooks_with_kwargs, block._forward_hooks
        before = [list(table.items()) for table in tables]
        restore = snapshot_splices(block, place)
        set_splices(block, place, [nn.Identity() for _ in range(present)])
        reached = interrupted_at(line, restore)
        restore()
        assert [list(table.items()) for table in tables] == before, line
    assert line > 5


def test_a_window_over_the_splice_gives_the_class_back() -> None:
    model = repaired("llama")  # the splice stands before its block 1
    assert type(model).__name__ == "StreamlinedLlamaForCausalLM"
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(0, 2))
        assert surgeon.plan.splices == ()
        surgeon.commit()
    assert type(model).__name__ == "LlamaForCausalLM" and type(model.config).__name__ == "LlamaConfig"


@pytest.mark.parametrize("training", [False, True])
def test_the_list_of_what_is_spliced_in_has_the_mode_of_the_block(training: bool) -> None:
    model = tiny_model("llama").train(training)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(2, 4), LinearReplacement(32))
        surgeon.commit()
    assert {module.training for module in model.modules()} == {training}
