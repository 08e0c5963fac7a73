"""The contracts of LayerSurgeon, over families, windows, paddings, precisions and caches."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import (
    HiddenStateRecorder,
    LayerSurgeon,
    StreamlineError,
    UnsupportedSurgery,
    find_stack,
    profile,
    save,
)
from streamline_hooks.modeling import read_output, write_output
from tests.tiny_models import BLOCKS, FAMILIES, Nudge, left_padded, repaired, tiny_config, tiny_model, tokens

families = st.sampled_from(FAMILIES)
windows = (
    st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS - 1))
    .map(lambda w: range(w[0], min(w[0] + w[1], BLOCKS)))
    .filter(lambda w: len(w) < BLOCKS)
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def logits(model: nn.Module, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(**(batch or {"input_ids": tokens(2, 9)}), use_cache=False).logits


def bypassed(model: nn.Module, window: range, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """The truth that a removal is held to: every block runs, and the window's output is thrown away for its input."""
    stack = find_stack(model)
    kept: dict[str, torch.Tensor] = {}
    handles = [
        stack[window.start].register_forward_pre_hook(lambda m, args: kept.update(state=args[0])),
        stack[window.stop - 1].register_forward_hook(lambda m, args, out: write_output(out, kept["state"])),
    ]
    try:
        return logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def fingerprint(model: nn.Module) -> list[object]:
    """Everything that a surgeon must give back to the bit."""
    rows: list[object] = [type(model), type(model.config), json.dumps(model.config.to_dict(), default=str)]
    rows += [(k, id(v)) for k, v in vars(model.config).items()]
    for name, module in model.named_modules():
        attributes = {k: v for k, v in vars(module).items() if not k.startswith("_") or k.startswith("_streamline")}
        if transformers.__version__ < "5":  # which leaves an own `forward` on blocks whose states were asked for
            attributes.pop("forward", None)
        rows.append((name, id(module), list(module._modules), str(attributes.keys())))
        rows += [(name, k, v) for k, v in attributes.items() if isinstance(v, (int, float, str, bool))]
        rows += [(name, list(hooks.items())) for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        rows += [(name, dict(module._forward_pre_hooks_with_kwargs), dict(module._forward_hooks_with_kwargs))]
    rows += [(name, id(p), p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()]
    rows += [(key, value.double().sum().item()) for key, value in model.state_dict().items()]
    return rows


# The identity laws


@given(families, st.integers(0, BLOCKS), dtypes)
def test_an_inserted_identity_changes_nothing_to_the_bit(family: str, k: int, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    before = logits(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(k, nn.Identity())
        assert torch.equal(logits(model), before)


@given(families, st.integers(0, BLOCKS - 1))
def test_a_block_in_its_own_place_changes_nothing_to_the_bit(family: str, k: int) -> None:
    model = tiny_model(family)
    before = logits(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(k, k + 1), surgeon.stack[k])
        assert torch.equal(logits(model), before)
        assert [m is b for m, b in zip(surgeon.stack.container, surgeon.stack.blocks, strict=True)] == [True] * BLOCKS


@given(families, windows)
def test_replacing_by_an_identity_is_removing(family: str, window: range) -> None:
    model = tiny_model(family)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(window, nn.Identity())
        replaced = logits(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(window)
        assert torch.equal(logits(model), replaced)


# Removal against the truth


@given(families, windows, st.booleans(), dtypes)
def test_removing_is_bypassing(family: str, window: range, padded: bool, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    batch = left_padded(3, 9) if padded else None
    expected = bypassed(model, window, batch)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(window)
        got = logits(model, batch)
    real = slice(None) if batch is None else batch["attention_mask"].bool()
    assert torch.equal(got[real], expected[real])


@given(families, windows)
def test_removing_is_a_shorter_model_with_the_kept_weights(family: str, window: range) -> None:
    model = tiny_model(family)
    kept = [k for k in range(BLOCKS) if k not in window]
    types = {"layer_types": [model.config.layer_types[k] for k in kept]} if family == "gemma3" else {}
    shorter = type(model)(tiny_config(family, num_hidden_layers=len(kept), **types)).eval()
    path = find_stack(model).path
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(f"{path}.")}
    for new, old in enumerate(kept):
        weights |= {f"{path}.{new}.{k}": v for k, v in find_stack(model)[old].state_dict().items()}
    shorter.load_state_dict(weights)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(window)
        assert list(model.state_dict()) == list(shorter.state_dict())
        assert torch.equal(logits(model), logits(shorter))
        assert model.config.num_hidden_layers == len(kept)


@given(families, windows, st.booleans(), st.sampled_from(["removed", "spliced", "slot"]))
def test_generate_with_a_cache_equals_without(family: str, window: range, padded: bool, how: str) -> None:
    model = tiny_model(family)
    batch = left_padded(2, 7) if padded else {"input_ids": tokens(2, 7), "attention_mask": torch.ones(2, 7).long()}
    module = {"removed": None, "spliced": Nudge(), "slot": copy.deepcopy(find_stack(model)[window.stop - 1])}[how]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(window, module)
        with_cache = model.generate(**batch, **options, use_cache=True)
        without = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(with_cache, without)


@given(families, windows)
def test_stepwise_decoding_equals_the_full_forward(family: str, window: range) -> None:
    model = tiny_model(family)
    ids = tokens(2, 8)
    with LayerSurgeon(model) as surgeon, torch.no_grad():
        surgeon.replace(window, Nudge())
        whole = model(ids, use_cache=False).logits
        cache, steps = None, []
        for t in range(ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


# Numbers


def test_every_number_is_the_original_one() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        surgeon.remove(range(3, 5))
        surgeon.insert(5, Nudge())
        assert surgeon.plan.kept == (1, 2, 5)
        assert surgeon.plan.old_to_new == {1: 0, 2: 1, 5: 2}
        assert [m is surgeon.stack[k] for m, k in zip(surgeon.stack.container, (1, 2, 5), strict=True)] == [True] * 3
        assert [b.self_attn.layer_idx for b in model.model.layers] == [0, 1, 2]


def test_the_plan_prints_old_to_new() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 4), Nudge())
        surgeon.insert(BLOCKS, Nudge())
        assert str(surgeon.plan).splitlines() == [
            "model.layers: 6 blocks -> 3",
            "     0  -> 0",
            "        -> Nudge in place of 1 to 3",
            "     4  -> 1",
            "     5  -> 2",
            "        -> Nudge",
            "removed: 1, 2, 3",
        ]


@given(families, st.integers(0, BLOCKS))
def test_insert_runs_before_block_k(family: str, k: int) -> None:
    model, nudge = tiny_model(family), Nudge()
    stack = find_stack(model)

    def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (nudge(args[0]), *args[1:])

    if k < BLOCKS:
        handle = stack[k].register_forward_pre_hook(before)
    else:
        handle = stack[-1].register_forward_hook(lambda m, args, out: write_output(out, nudge(read_output(out))))
    expected = logits(model)
    handle.remove()
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(k, nudge)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("k", [0, 3, BLOCKS])
def test_several_at_one_place_run_in_their_order(k: int) -> None:
    model, order = tiny_model("llama"), []

    class Says(nn.Identity):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, state: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            return state

    with LayerSurgeon(model) as surgeon:
        for name in "abc":
            surgeon.insert(k, Says(name))
        logits(model)
    assert order == ["a", "b", "c"]


def test_a_block_that_is_put_in_takes_a_slot_and_a_stranger_none() -> None:
    model = tiny_model("gemma3")
    with LayerSurgeon(model) as surgeon:
        added = surgeon.insert(1, surgeon.stack[4])
        surgeon.insert(1, Nudge())
        assert added is not surgeon.stack[4]
        assert len(surgeon.stack.container) == BLOCKS + 1 == model.config.num_hidden_layers
        assert [b.self_attn.layer_idx for b in surgeon.stack.container] == list(range(BLOCKS + 1))
        # it attends as the block that it is a copy of
        assert model.config.layer_types[1] == "sliding_attention" == model.config.layer_types[5]
        assert logits(model).isfinite().all()


def test_a_copy_made_inside_the_context_keeps_its_own_settings() -> None:
    model = tiny_model("gemma3")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        copied = copy.deepcopy(surgeon.stack.container[0])  # the old block 1, which attends fully
        surgeon.insert(BLOCKS, copied)
        assert model.config.layer_types[-1] == "full_attention"
    assert "_streamline_hooks_origin" not in vars(find_stack(model)[1])


def test_a_copy_made_after_an_inner_surgeon_closed_keeps_its_own_settings() -> None:
    model = tiny_model("gemma3")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        with LayerSurgeon(model) as inner:
            inner.remove([2])
        copied = copy.deepcopy(surgeon.stack.container[0])  # the old block 1, which attends fully
        surgeon.insert(BLOCKS, copied)
        assert model.config.layer_types[-1] == "full_attention"


def test_a_block_of_unknown_settings_is_refused() -> None:
    model = tiny_model("gemma3")
    stranger = copy.deepcopy(find_stack(model)[0])
    stranger.layer_idx = stranger.self_attn.layer_idx = 99
    with (
        LayerSurgeon(model) as surgeon,
        pytest.raises(StreamlineError, match=r"per-layer settings.*layer_types.*Insert a copy"),
    ):
        surgeon.insert(2, stranger)


# Coming back


def leave_normally(model: nn.Module, work: Callable[[LayerSurgeon], None]) -> None:
    with LayerSurgeon(model) as surgeon:
        work(surgeon)


def leave_by(error: type[BaseException]) -> Callable[[nn.Module, Callable[[LayerSurgeon], None]], None]:
    def leave(model: nn.Module, work: Callable[[LayerSurgeon], None]) -> None:
        with pytest.raises(error), LayerSurgeon(model) as surgeon:
            work(surgeon)
            raise error

    return leave


WAYS = [leave_normally, leave_by(ValueError), leave_by(KeyboardInterrupt)]


@pytest.mark.parametrize("leave", WAYS, ids=["return", "exception", "keyboard-interrupt"])
@given(family=families, window=windows, k=st.integers(0, BLOCKS))
def test_everything_comes_back_to_the_bit(leave: Callable[..., None], family: str, window: range, k: int) -> None:
    model = tiny_model(family)
    before = fingerprint(model)

    def work(surgeon: LayerSurgeon) -> None:
        surgeon.insert(BLOCKS, Nudge())
        surgeon.replace(window, Nudge())
        if not window.start < k < window.stop:
            surgeon.insert(k, surgeon.stack[0])
        logits(model)

    leave(model, work)
    assert fingerprint(model) == before


def test_a_failed_operation_leaves_the_earlier_ones() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        before = fingerprint(model)
        with pytest.raises(StreamlineError, match=r"all 6 blocks"):
            surgeon.remove(range(0, 2)), surgeon.remove(range(3, 6))
        assert surgeon.plan.removed == (0, 1, 2)
        surgeon_before = logits(model)
        with pytest.raises(StreamlineError):
            surgeon.remove(range(3, 6))
        assert torch.equal(logits(model), surgeon_before)
    assert before != fingerprint(model)


def test_hooks_that_a_user_adds_inside_stay() -> None:
    model, seen = tiny_model("llama"), []
    block = find_stack(model)[3]
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(3, Nudge())
        block.register_forward_pre_hook(lambda m, args: seen.append(1))
        surgeon.remove([0])
    logits(model)
    assert seen == [1] and len(block._forward_pre_hooks) == 1


def test_nested_surgeons_close_in_order() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    with LayerSurgeon(model) as outer:
        outer.remove([0])
        with LayerSurgeon(model) as inner:
            inner.remove([0])
            assert inner.plan.old_length == 5
            with pytest.raises(StreamlineError, match="later LayerSurgeon is open"):
                outer.remove([3])
            with pytest.raises(StreamlineError, match=r"inside another open surgeon"):
                inner.commit()
        assert len(outer.stack.container) == 5
    assert fingerprint(model) == before


def test_closing_out_of_order_raises() -> None:
    model = tiny_model("llama")
    outer, inner = LayerSurgeon(model), LayerSurgeon(model)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(StreamlineError, match=r"opposite order"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)


def test_moving_the_model_inside_takes_the_removed_blocks_along() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), Nudge())
        model.to(torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert logits(model).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(tiny_model("llama", torch.bfloat16)))


INSIDE: dict[str, Callable[[LayerSurgeon], object]] = {
    "nothing else": lambda surgeon: None,
    "one removed": lambda surgeon: surgeon.remove([3]),
    "one inserted": lambda surgeon: surgeon.insert(4, copy.deepcopy(surgeon.stack.container[0])),
    "a removed one moved": lambda surgeon: surgeon.insert(BLOCKS, surgeon.stack[0]),
}


@pytest.mark.parametrize("then", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("replaced", [[0], range(BLOCKS)], ids=["first", "all"])
def test_what_is_done_after_the_model_was_moved_keeps_its_precision_and_mode(
    replaced: range, then: Callable[[LayerSurgeon], object]
) -> None:
    """Block 0, which is out of the model, is neither moved nor set to training with it."""
    model = tiny_model("llama")
    with LayerSurgeon(model, probe=False) as surgeon:
        surgeon.replace(replaced, copy.deepcopy(surgeon.stack[1]))
        model.to(torch.float64).train()
        with contextlib.suppress(StreamlineError):  # not all of these are possible without any block
            then(surgeon)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert {m.training for m in model.modules()} == {True}
        assert logits(model).dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {m.training for m in model.modules()} == {True}


@given(families, dtypes)
def test_a_spliced_module_has_the_precision_of_the_blocks(family: str, dtype: torch.dtype) -> None:
    model, nudge = tiny_model(family, dtype), Nudge()
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), nudge)
        assert nudge.weight.dtype == dtype
        with HiddenStateRecorder(model, [1]) as record:
            logits(model)
        assert record.inputs[1][0].dtype == dtype


def test_a_deep_copy_made_inside_runs_its_own_weights() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        nudge = surgeon.replace(range(1, 3), Nudge())
        duplicate = copy.deepcopy(model)
        expected = logits(model)
        nudge.weight.data.zero_()
        assert torch.equal(logits(duplicate), expected)
        assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(duplicate), expected)


def test_a_named_stack() -> None:
    model = tiny_model("opt")
    with LayerSurgeon(model, stack="model.decoder.layers") as surgeon:
        surgeon.remove([0])
        assert len(model.model.decoder.layers) == 5
    with pytest.raises(StreamlineError, match=r"'model.layers'.*'model.decoder.layers' \(6"):
        LayerSurgeon(model, stack="model.layers").__enter__()


# Transformers' own hidden states


def test_hidden_states_asked_for_first_inside_a_removal() -> None:
    model = tiny_model("llama")
    expected = tiny_model("llama")(tokens(2, 9), output_hidden_states=True).hidden_states
    before = fingerprint(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
        inside = model(tokens(2, 9), output_hidden_states=True).hidden_states
        surgeon.remove([4])
        assert len(model(tokens(2, 9), output_hidden_states=True).hidden_states) == 4
    assert len(inside) == 5
    assert fingerprint(model) == before
    after = model(tokens(2, 9), output_hidden_states=True).hidden_states
    assert len(after) == len(expected) == 7
    assert all(torch.equal(a, e) for a, e in zip(after, expected, strict=True))


def test_hidden_states_of_a_block_that_is_new() -> None:
    model = tiny_model("llama")
    fresh = type(find_stack(model)[0])(model.config, 0).eval()
    model(tokens(2, 9), output_hidden_states=True)
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(2, fresh)
        assert len(model(tokens(2, 9), output_hidden_states=True).hidden_states) == 8
    assert not fresh._forward_hooks


# Saying no


@pytest.mark.parametrize(
    ("window", "text"),
    [
        ([], r"window=\[\] is not a window.*Pass a range"),
        (range(4, 9), r"\[4, 5, 6, 7, 8\] is not a window.*0 to 5"),
        ([-1], r"\[-1\] is not a window"),
        ([1, 3], r"\[1, 3\].*consecutive blocks.*range\(3, 5\)"),
        (range(6), r"all 6 blocks of model.layers.*Leave"),
    ],
)
def test_windows_that_cannot_go(window: range, text: str) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    with LayerSurgeon(model) as surgeon, pytest.raises(StreamlineError, match=text):
        surgeon.remove(window)
    assert fingerprint(model) == before


def test_the_same_block_cannot_go_twice() -> None:
    with LayerSurgeon(tiny_model("llama")) as surgeon:
        surgeon.remove(range(1, 3))
        with pytest.raises(StreamlineError, match=r"blocks 2.*3 overlaps .*blocks 1 to 2"):
            surgeon.remove(range(2, 4))
        with pytest.raises(StreamlineError, match=r"block 2.*1 or 3"):
            surgeon.insert(2, Nudge())
        surgeon.insert(4, Nudge())
        with pytest.raises(StreamlineError, match=r"blocks 3 to 5.*before block 4.*separately"):
            surgeon.remove(range(3, 6))
        surgeon.insert(4, Nudge())
        with pytest.raises(StreamlineError, match="contains? the position before block 4"):
            surgeon.remove(range(3, 5))
        with pytest.raises(StreamlineError, match=r"insert.7.*0 to 6.*6 blocks"):
            surgeon.insert(7, Nudge())


def test_a_module_of_another_width_says_so() -> None:
    class Narrow(nn.Module):
        def forward(self, state: torch.Tensor) -> torch.Tensor:
            return state[..., :-1]

    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), Narrow())
        with pytest.raises(StreamlineError, match=r"\(2.*9.*31\)"):
            logits(model)


def test_a_closed_surgeon_refuses() -> None:
    surgeon = LayerSurgeon(tiny_model("llama"))
    with pytest.raises(StreamlineError, match=r"not open"):
        surgeon.remove([1])
    with surgeon:
        pass
    with pytest.raises(StreamlineError, match=r"not open"):
        surgeon.remove([1])
    with pytest.raises(StreamlineError, match=r"opened before"):
        surgeon.__enter__()


def test_saving_is_refused_from_the_opening_on(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    with LayerSurgeon(model):
        duplicate = copy.deepcopy(model)
        for refused in (model, duplicate):
            with pytest.raises(StreamlineError, match=r"inside an open LayerSurgeon"):
                save(refused, tmp_path)
    assert fingerprint(model) == before
    save(model, tmp_path)


def test_saving_inside_raises() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        for part in (model, model.model):
            with pytest.raises(StreamlineError, match=r"LayerSurgeon.*commit\(\)"):
                part.save_pretrained("nowhere")


def test_a_compiled_model_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match=r"compiled by torch.compile"):
        LayerSurgeon(torch.compile(model)).__enter__()
    model.model.layers[1].compile()
    with pytest.raises(StreamlineError, match=r"'model.layers.1'.*torch.compile"):
        LayerSurgeon(model).__enter__()


def test_shared_blocks_are_named() -> None:
    model = tiny_model("llama")
    model.model.layers[3].mlp = model.model.layers[1].mlp
    with LayerSurgeon(model) as surgeon:
        with pytest.raises(UnsupportedSurgery, match=r"blocks 1.*3 share.*despite_hazards=True"):
            surgeon.remove([1])
        assert [h.cause for h in surgeon.check([3])] == ["tied-blocks"]
        assert surgeon.check([0]) == []
        surgeon.remove([1], despite_hazards=True)


@pytest.mark.parametrize("order", [[0, 1, 2, 1, 4, 5], [1, 2, 1, 2, 3, 4], [1] * 6], ids=["one", "two", "all"])
def test_a_stack_with_a_repeated_block_is_refused_and_left_as_it_is(order: list[int]) -> None:
    model = tiny_model("llama")
    blocks = list(model.model.layers)
    model.model.layers = nn.ModuleList([blocks[k] for k in order])
    before, expected = fingerprint(model), logits(model)
    refusals = [
        lambda: LayerSurgeon(model).__enter__(),
        lambda: HiddenStateRecorder(model),
        lambda: profile(model, [{"input_ids": tokens(2, 9)}]),
    ]
    for refused in refusals:
        with pytest.raises(StreamlineError, match=r"model.layers.*LlamaForCausalLM.*LlamaDecoderLayer"):
            refused()
    assert [id(block) for block in model.model.layers] == [id(blocks[k]) for k in order]
    assert fingerprint(model) == before and torch.equal(logits(model), expected)


def test_a_block_repeated_inside_the_context_deletes_no_position() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        model.model.layers[3] = model.model.layers[1]
        surgeon.insert(6, nn.Identity())
    assert len(model.model.layers) == BLOCKS and model.model.layers[3] is model.model.layers[1]


def test_no_surgeon_keeps_a_model_alive() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
    reference = weakref.ref(model)
    del model, surgeon
    gc.collect()
    assert reference() is None


# Committing


def test_a_committed_surgeon_closes_without_a_look_at_what_was_opened_after_it() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        surgeon.commit()
        later = LayerSurgeon(model).__enter__()
        later.remove([0])
    assert len(surgeon.stack) == BLOCKS - 1 and len(find_stack(model)) == BLOCKS - 2
    later.__exit__(None, None, None)
    assert len(find_stack(model)) == BLOCKS - 1


def test_commit_is_permanent_and_says_what_was_done() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(2, 4))
        plan = surgeon.commit(calibration="none")
        expected = logits(model)
    assert plan.removed == (2, 3)
    assert torch.equal(logits(model), expected)
    assert model.config.streamline_hooks["history"][0]["removed"] == [2, 3]
    assert model.config.streamline_hooks["history"][0]["calibration"] == "none"
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any("_streamline_hooks_origin" in vars(m) for m in model.modules())
    with LayerSurgeon(model) as again:
        again.remove([0])
        assert again.plan.old_length == 4


def test_a_model_that_its_class_would_build_otherwise_is_not_committed() -> None:
    """GPT-2's scale by number is baked into the block (Transformers 5) or read while it runs (4)."""
    model = type(tiny_model("gpt2"))(tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True)).eval()
    expected = bypassed(model, range(0, 1))
    before = fingerprint(model)
    with LayerSurgeon(model) as surgeon:
        if [h.cause for h in surgeon.check([0])] == ["scale-by-index"]:
            with pytest.raises(UnsupportedSurgery, match=r"scaled by the block index in blocks 0 to 5"):
                surgeon.remove([0])
        else:
            assert [h.cause for h in surgeon.check([0])] == ["built-from-index"]
            surgeon.remove([0])
            assert torch.equal(logits(model), expected)  # in memory it is right
            with pytest.raises(UnsupportedSurgery, match=r"Block 0.*attn.scaling"):
                surgeon.commit()
    assert fingerprint(model) == before


def test_the_splice_of_a_block_that_goes_stays() -> None:
    model = tiny_model("llama")
    plain = type(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([2], Nudge())
        surgeon.commit()
    assert type(model) is not plain and issubclass(type(model), plain)
    expected = logits(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])  # the block that carries the splice, which stands before it
        assert [s.module for s in surgeon.plan.splices] == ["Nudge"]
    assert torch.equal(logits(model), expected)


def test_the_blocks_that_carry_a_splice_go_one_at_a_time_as_they_go_at_once() -> None:
    model = repaired("llama", range(1, 2))  # block 1 carries the splice now
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1, 2])
        at_once = logits(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        surgeon.remove([2])
        assert torch.equal(logits(model), at_once)
