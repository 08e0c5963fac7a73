"""Interventions compute what they state at every site, leave nothing behind, and compose in the order of opening."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.modeling import read_output, write_output
from streamline_hooks.recording import (
    BLOCK_SITES,
    MODEL_SITES,
    Add,
    Edit,
    Intervention,
    Mean,
    Patch,
    RecordingConfig,
    Replace,
    Resample,
    Scale,
    Zero,
)
from streamline_hooks.testing import assert_restores, causal_model_types, tiny_inputs
from streamline_hooks.testing import tiny_model as tiny_of_type
from tests.tiny_models import BLOCKS, FAMILIES, WIDTH, Nudge, left_padded, padded, tiny_model, tokens

IDS = tokens(2, 9)
KEYS: list[Any] = [*((site, 2) for site in BLOCK_SITES), *MODEL_SITES]
KINDS = ["granite", "granitemoehybrid", "gemma2", "gptj", "mixtral"]


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def model_of(kind: str) -> nn.Module:
    if kind in FAMILIES:
        return tiny_model(kind)
    if kind not in causal_model_types():
        pytest.skip(f"this Transformers has no {kind}")
    return tiny_of_type(kind, blocks=3, **({"residual_multiplier": 0.22} if kind == "granite" else {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_identities_change_no_bit(family: str) -> None:
    model = tiny_model(family)
    expected = logits(model)
    same: dict[Any, Edit] = {key: Scale(1.0) for key in KEYS}
    with Intervention(model, same):
        assert torch.equal(logits(model), expected)
    with Intervention(model, {key: Add(torch.zeros(1)) for key in KEYS}, tokens="last"):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", [*FAMILIES, *KINDS])
@torch.no_grad()
def test_a_zeroed_contribution_is_a_zeroed_branch(kind: str) -> None:
    """Of the right block: the others give other logits."""
    model = model_of(kind)
    for branch in ("attention", "mlp"):
        with LayerSurgeon(model, probe=False) as surgeon:
            surgeon.zero_branch(1, branch)  # type: ignore[arg-type]
            expected = logits(model)
        with Intervention(model, {(f"{branch}.output", 1): Zero()}):
            torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
        with Intervention(model, {(f"{branch}.output", 2): Zero()}):
            assert not torch.allclose(logits(model), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [*FAMILIES, *KINDS])
@torch.no_grad()
def test_a_replaced_contribution_is_added(kind: str) -> None:
    """After norms and multipliers: the recorded sum has the value itself."""
    model = model_of(kind)
    value = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    sites = ["block.input", "attention.output", "mlp.output", "block.output"]
    for branch in ("attention.output", "mlp.output"):
        edit = Intervention(model, {(branch, 1): Replace(value)})
        with edit, HiddenStateRecorder(model, [1], sites=sites) as record:
            model(IDS)
        before, attention, mlp, after = (record[site][1][0] for site in sites)  # type: ignore[call-overload]
        torch.testing.assert_close(
            attention if branch[0] == "a" else mlp, value.expand_as(before), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(before + attention + mlp, after, atol=1e-5, rtol=1e-5)


@pytest.mark.sample(20)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", KEYS, ids=str)
@torch.no_grad()
def test_patching_everything_gives_the_other_prompt(family: str, key: Any) -> None:
    """From any site at which all later computation passes; at the others, all sites of the block together."""
    model, other = tiny_model(family), tokens(2, 9, seed=5)
    assert not torch.allclose(logits(model, other), logits(model), atol=1e-3)
    site, k = (key, None) if isinstance(key, str) else key
    keys = [key] if k is None or site.startswith("block.") else [("block.input", k), key]
    names = [name if isinstance(name, str) else name[0] for name in keys]
    with HiddenStateRecorder(model, [2], sites=names) as record:
        expected = model(other).logits
    edits = {
        name: Patch(record[name] if isinstance(name, str) else record[name[0]][name[1]])  # type: ignore[call-overload]
        for name in keys
    }
    with Intervention(model, edits):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_patched_branch_input_gives_the_contribution_of_the_other_prompt() -> None:
    model, other = tiny_model("opt"), tokens(2, 9, seed=5)
    for site, result in [("attention.input", "attention.output"), ("attention.heads", "attention.output"),
                         ("mlp.input", "mlp.output")]:  # fmt: skip
        with HiddenStateRecorder(model, [2], sites=[site, result]) as record:
            model(other)
            with Intervention(model, {(site, 2): Patch(record[site][2])}):  # type: ignore[call-overload]
                record_inside = HiddenStateRecorder(model, [2], sites=[result])
                with record_inside:
                    model(IDS)
        torch.testing.assert_close(record_inside[result][2][0], record[result][2][0])  # type: ignore[call-overload]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_tokens_are_numbered_without_the_padding(side: str) -> None:
    model, batch = tiny_model("llama"), padded([9, 5, 7], side)
    real = batch["attention_mask"].bool()
    choices: list[tuple[Any, list[list[int]]]] = [
        ("last", [[8], [4], [6]]), ([0, -1], [[0, 8], [0, 4], [0, 6]]), ([2], [[2]] * 3), ([-2], [[7], [3], [5]])
    ]  # fmt: skip
    with HiddenStateRecorder(model, [1], sites=["mlp.output"], tokens="real") as record:
        record(**batch)
        for choice, wanted in choices:
            with Intervention(model, {("mlp.output", 1): Zero()}, tokens=choice):
                with HiddenStateRecorder(model, [1], sites=["mlp.output"]) as inside:
                    inside(**batch)
            zero = ~inside["mlp.output"][1][0].any(-1)
            expected = [
                [i for i, z in enumerate(row[mask].tolist()) if z] for row, mask in zip(zero, real, strict=True)
            ]
            assert expected == wanted
            assert not zero[~real].any()
    with pytest.raises(StreamlineError, match="Token 5 does not exist.*the shortest has 5"):
        with Intervention(model, {("mlp.output", 1): Zero()}, tokens=[5]), HiddenStateRecorder(model, [1]) as record:
            record(**batch)


@torch.no_grad()
def test_a_mask_and_real_tokens() -> None:
    model, batch = tiny_model("gpt2"), left_padded(3, 9)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    for choice, expected in ((mask, mask), ("real", batch["attention_mask"].bool()), ("all", torch.ones(3, 9) > 0)):
        with (
            Intervention(model, {("block.output", 1): Zero()}, tokens=choice),
            HiddenStateRecorder(model, [1]) as record,
        ):
            model(**batch)
        assert torch.equal(~record.outputs[1][0].any(-1), expected)
    with pytest.raises(StreamlineError, match=r"mask of shape \(3, 4\)"):
        with Intervention(model, {("block.output", 1): Zero()}, tokens=mask[:, :4]):
            model(**batch)


@pytest.mark.parametrize(
    ("steps", "changed"),
    [("all", [0, 1, 2, 3]), ("prefill", [0]), ("decode", [1, 2, 3]), ([2], [2]), (range(1, 3), [1, 2])],
)
@pytest.mark.parametrize("cache", [None, "static"])
def test_steps_of_generation(steps: Any, changed: list[int], cache: str | None) -> None:
    model = tiny_model("llama")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    with Intervention(model, {("mlp.output", 1): Zero()}, steps=steps, tokens="last"):
        with HiddenStateRecorder(model, [1], sites=["mlp.output"]) as record:
            for _ in range(2):  # a second generation starts again with its prefill
                model.generate(**left_padded(2, 7), **options)
    visits = record["mlp.output"][1]
    assert [i for i, state in enumerate(visits) if not state[:, -1].any()] == changed + [c + 4 for c in changed]
    assert visits[0][:, 0].any() and visits[0][0, :-1].any()


@pytest.mark.parametrize("steps", ["prefill", "decode", [1]])
def test_steps_of_a_prompt_in_parts_are_refused(steps: Any) -> None:
    model = tiny_model("llama")
    with torch.no_grad(), Intervention(model, {("mlp.output", 1): Zero()}, steps=steps):
        cache = model(IDS[:, :4], use_cache=True).past_key_values
        with pytest.raises(StreamlineError, match=r"runs 3 tokens after 4 cached ones.*omit steps"):
            model(IDS[:, 4:7], past_key_values=cache)
        model.generate(IDS[:, :4], max_new_tokens=3)
    with Intervention(model, {("mlp.output", 1): Zero()}, tokens="last"):
        cache = model(IDS[:, :4], use_cache=True).past_key_values
        model(IDS[:, 4:7], past_key_values=cache)


def test_a_step_equals_a_longer_prompt() -> None:
    """Steering every decoded token, with a cache, gives the logits of the whole text with these tokens steered."""
    model, vector, prompt = tiny_model("llama"), torch.randn(WIDTH), IDS[:1, :6]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    with Intervention(model, {("block.output", 2): Add(vector)}, steps="decode"):
        result = model.generate(prompt, output_logits=True, **options)
    with Intervention(model, {("block.output", 2): Add(vector)}, tokens=[6, 7, 8]):
        whole = logits(model, result.sequences[:, :-1])
    torch.testing.assert_close(torch.stack(result.logits, dim=1), whole[:, 5:], atol=1e-4, rtol=1e-4)
    with pytest.raises(StreamlineError, match="cached tokens.*steps='prefill'"):
        with Intervention(model, {("block.output", 2): Add(vector)}, tokens=[0]):
            model.generate(prompt, **options)


@torch.no_grad()
def test_a_recorded_generation_is_patched_pass_by_pass() -> None:
    model = tiny_model("llama")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with HiddenStateRecorder(model, [-1], sites=["block.output"]) as record:
        expected = model.generate(tokens(2, 9, seed=5), **options)
    with Intervention(model, {("block.output", -1): Patch(record.outputs[BLOCKS - 1])}):
        assert torch.equal(model.generate(IDS, **options)[:, 9:], expected[:, 9:])
    with pytest.raises(StreamlineError, match="has 4 recorded states, but forward pass 4"):
        with Intervention(model, {("block.output", -1): Patch(record.outputs[BLOCKS - 1])}):
            model.generate(IDS, **{**options, "max_new_tokens": 5})


@torch.no_grad()
def test_ablations_take_their_values_from_real_tokens() -> None:
    model = tiny_model("llama")
    outputs: dict[str, list[Tensor]] = {}
    for side in ("left", "right"):
        batch = padded([9, 5, 7], side)
        real = batch["attention_mask"].bool()
        with HiddenStateRecorder(model, [1], sites=["mlp.output"]) as record:
            record(**batch)
        states = record["mlp.output"][1][0][real]
        for name, edit in {"mean": Mean(), "mean of states": Mean(states), "resample": Resample(seed=3)}.items():
            with Intervention(model, {("mlp.output", 1): edit}, tokens="real"):
                with HiddenStateRecorder(model, [1], sites=["mlp.output"], tokens="real") as inside:
                    inside(**batch)
            outputs.setdefault(name, []).append(inside["mlp.output"][1][0])
        torch.testing.assert_close(outputs["mean"][-1], states.mean(0).expand(21, -1), atol=1e-5, rtol=1e-5)
        distances = torch.cdist(outputs["resample"][-1], states)
        assert (distances.min(1).values < 1e-4).all() and len(distances.argmin(1).unique()) > 5
    for left, right in outputs.values():
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)
    with pytest.raises(StreamlineError, match="has 1. Expected at least two"):
        with Intervention(model, {("mlp.output", 1): Mean()}):
            model(IDS[:1, :1])


@torch.no_grad()
def test_a_head_is_ablated() -> None:
    model = tiny_model("qwen3")
    factor = torch.tensor([1.0, 1, 0, 1])[:, None]
    with Intervention(model, {("attention.heads", 1): Scale(factor)}):
        ablated = logits(model)
    changed = copy.deepcopy(model)
    changed.model.layers[1].self_attn.o_proj.weight[:, 16:24] = 0
    torch.testing.assert_close(ablated, logits(changed))
    assert not torch.allclose(ablated, logits(model), atol=1e-3)


def test_gradients_flow_through_an_edit() -> None:
    """In Granite through its multiplier, and where the value is unchanged."""
    model = model_of("granite")
    vector, factor = torch.zeros(WIDTH, requires_grad=True), torch.ones(1, requires_grad=True)
    with Intervention(model, {("mlp.output", 1): [Add(vector), Scale(factor)]}, tokens="last"):
        loss = model(IDS).logits.square().sum()
    gradients = torch.autograd.grad(loss, (vector, factor))
    for index, (tensor, gradient) in enumerate(zip((vector, factor), gradients, strict=True)):
        moved = [vector.detach().clone(), factor.detach().clone()]
        moved[index][0] += 1e-2
        with Intervention(model, {("mlp.output", 1): [Add(moved[0]), Scale(moved[1])]}, tokens="last"):
            above = logits(model).square().sum()
        moved[index][0] -= 2e-2
        with Intervention(model, {("mlp.output", 1): [Add(moved[0]), Scale(moved[1])]}, tokens="last"):
            below = logits(model).square().sum()
        assert gradient.flatten()[0] == pytest.approx(float(above - below) / 2e-2, rel=0.05, abs=1e-2)
        assert tensor.grad is None


@pytest.mark.parametrize("key", [("attention.output", 2), ("block.input", 2)])
def test_gradient_checkpointing_changes_the_same_tokens(key: Any) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = copy.deepcopy(tiny_model("llama")).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with Intervention(model, {key: Scale(0.3)}, tokens="last"):
            for _ in range(2):
                model(**left_padded(2, 9), use_cache=False).logits.square().mean().backward()
        gradients.append(model.model.layers[2].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients)
    with Intervention(model, {("attention.output", 2): Scale(0.3)}, tokens="last"):
        losses = [model(**left_padded(2, 9), use_cache=False).logits.square().mean() for _ in range(2)]
        with pytest.raises(StreamlineError, match="several forward passes"):
            sum(losses).backward()


def user_hook(module: nn.Module, factor: float) -> AbstractContextManager[Any]:
    handle = module.register_forward_hook(
        lambda module, args, output: write_output(output, read_output(output) * factor)
    )
    return handle


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "scale", "record", "hook"]), st.integers(1, 3), st.integers(0, 3)),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=25)
@given(OPERATIONS, st.randoms(use_true_random=False))
def test_what_is_opened_runs_in_order_and_is_closed_in_any(operations: list[tuple[str, int, int]], random: Any) -> None:
    model = tiny_model("gpt2")
    before = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    block, expected_logits = find_stack(model)[1], logits(model)
    with torch.no_grad(), HiddenStateRecorder(model, [1]) as plain:
        model(IDS)
    opened: list[Any] = []
    for kind, number, _ in operations:
        context: Any
        if kind == "add":
            context = Intervention(model, {("block.output", 1): Add(torch.full((WIDTH,), float(number)))})
        elif kind == "scale":
            context = Intervention(model, {("block.output", 1): Scale(0.5 + number)})
        elif kind == "record":
            context = HiddenStateRecorder(model, [1], sites=["block.output"])
        else:
            context = user_hook(block, 1.0 + number)
        opened.append((kind, number, context.__enter__() or context))
    while opened:
        for kind, _, context in opened:
            if kind == "record":
                context.clear()
        logits(model)
        state = plain.outputs[1][0]
        for kind, number, context in opened:
            if kind == "record":
                torch.testing.assert_close(context.outputs[1][0], state)
            state = state + number if kind == "add" else state * (0.5 + number) if kind == "scale" else state
            state = state * (1.0 + number) if kind == "hook" else state
        opened.pop(random.randrange(len(opened)))[2].__exit__(None, None, None)
    assert before == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    assert torch.equal(logits(model), expected_logits)


@pytest.mark.parametrize("inserted_first", [True, False])
@torch.no_grad()
def test_splices_run_before_interventions(inserted_first: bool) -> None:
    model, vector = tiny_model("llama"), torch.ones(WIDTH)
    start, end = Nudge(seed=1), Nudge(seed=2)
    edit = Intervention(model, {("block.input", 2): Add(vector), ("block.output", -1): Scale(2.0)})
    with LayerSurgeon(model) as surgeon, HiddenStateRecorder(model, [1, BLOCKS - 1]) as before:
        with nullcontext() if inserted_first else edit:
            surgeon.insert(2, start)
            surgeon.insert(BLOCKS, end)
            with edit if inserted_first else nullcontext(), HiddenStateRecorder(model, [2, -1]) as record:
                model(IDS)
    torch.testing.assert_close(record.inputs[2][0], start(before.outputs[1][0]) + vector)
    torch.testing.assert_close(record.outputs[BLOCKS - 1][0], 2 * before.outputs[BLOCKS - 1][0])


@pytest.mark.parametrize("recorder_first", [True, False])
@torch.no_grad()
def test_a_contribution_that_is_a_difference_keeps_the_order(recorder_first: bool) -> None:
    """Granite's hybrid adds two modules: its MLP is what the block adds without the attention, after edits of it."""
    model = model_of("granitemoehybrid")
    edits = {("block.input", 1): Scale(2.0), ("attention.output", 1): Scale(3.0), ("mlp.output", 1): Scale(5.0)}
    sites = ["block.input", "attention.output", "mlp.output", "block.output"]
    edit, record = Intervention(model, edits), HiddenStateRecorder(model, [1], sites=sites)
    with record if recorder_first else edit, edit if recorder_first else record:
        model(IDS)
    before, attention, mlp, after = (record[site][1][0] for site in sites)  # type: ignore[call-overload]
    total = 2 * before + 3 * attention + 5 * mlp if recorder_first else before + attention + mlp
    torch.testing.assert_close(after, total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "granitemoehybrid"])
def test_interventions_restore(kind: str) -> None:
    model = model_of(kind)
    edits: dict[Any, Edit] = {(site, 1): Scale(0.5) for site in BLOCK_SITES if kind == "llama" or site != "mlp.input"}

    def half(model: nn.Module) -> Intervention:
        return Intervention(model, {**edits, "embeddings": Scale(2.0), "logits": Zero()})

    assert_restores(model, half, tiny_inputs(model))


@torch.no_grad()
def test_a_copy_is_not_changed() -> None:
    model = tiny_model("llama")
    expected = logits(model)
    with Intervention(model, {("mlp.output", 1): Zero()}):
        duplicate = copy.deepcopy(model)
        assert torch.equal(logits(duplicate), expected) and not torch.equal(logits(model), expected)


def test_the_logits_are_not_changed_after_the_loss() -> None:
    model = tiny_model("llama")
    with Intervention(model, {"logits": Zero()}):
        assert not logits(model).any() and not model(IDS)[0].any()
        with pytest.raises(StreamlineError, match="loss from the logits before they are changed"):
            model(IDS, labels=IDS)


@pytest.mark.parametrize(
    ("edits", "options", "message"),
    [
        ({}, {}, "edits={} is empty"),
        ({("attn", 1): Zero()}, {}, "site='attn' is unknown"),
        ({"block.output": Zero()}, {}, r"Expected a block for a site of a block.*Write \('block.output', 3\)"),
        ({("logits", 1): Zero()}, {}, "a model has only one logits"),
        ({("block.output", BLOCKS): Zero()}, {}, "block 6 is out of range"),
        ({("block.output", 1): Zero(), ("block.output", 1 - BLOCKS): Zero()}, {}, "block 1 twice"),
        ({("block.output", 1): torch.zeros(2)}, {}, "Wrap a tensor in Replace"),
        ({("block.output", 1): Zero()}, {"tokens": "some"}, "tokens='some' is unknown"),
        ({("block.output", 1): Zero()}, {"tokens": []}, "selects no token"),
        ({("block.output", 1): Zero()}, {"steps": "some"}, "steps='some' is unknown"),
        ({("block.output", 1): Zero()}, {"steps": [-1]}, r"steps=\[-1\] is invalid"),
    ],
)
def test_invalid_arguments(edits: Any, options: Any, message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        Intervention(tiny_model("llama"), edits, **options)


@pytest.mark.parametrize("edit", [Replace, Add, Scale])
def test_a_value_of_another_shape_is_not_broadcast(edit: Callable[[Tensor], Edit]) -> None:
    """(batch, features) would be taken for (tokens, features) where there are as many sequences as tokens."""
    model, ids = tiny_model("llama"), tokens(4, 4)
    for shape in [(4, WIDTH), (WIDTH + 1,), (4, 3, WIDTH)]:
        with pytest.raises(StreamlineError, match="does not fit block.output of block 1"):
            with Intervention(model, {("block.output", 1): edit(torch.ones(shape))}):
                model(ids)
    with pytest.raises(StreamlineError, match=r"recorded state of shape \(4, 3, 32\)"):
        with Intervention(model, {("block.output", 1): Patch(torch.ones(4, 3, WIDTH))}):
            model(ids)


def test_what_cannot_work_is_refused() -> None:
    model = tiny_model("llama")
    edit = Intervention(model, {("mlp.output", 1): Zero()}, steps=[3])
    with pytest.raises(StreamlineError, match="mlp.output of block 1 were not applied, although the model ran 1 times"):
        with edit:
            model(IDS)
    with edit, pytest.raises(StreamlineError, match="already open"):
        edit.__enter__()
    with pytest.raises(StreamlineError, match="Cannot change the activations of a compiled"):
        Intervention(torch.compile(model), {("mlp.output", 1): Zero()}).__enter__()
    if "falcon_h1" in causal_model_types():
        hybrid = tiny_of_type("falcon_h1", blocks=2)
        with pytest.raises(UnsupportedSurgery, match="attention.output of block 0 can be recorded but not changed"):
            Intervention(hybrid, {("attention.output", 0): Zero()}).__enter__()
    if "gemma3n_text" in causal_model_types():
        with pytest.raises(UnsupportedSurgery, match="streams"):
            Intervention(tiny_of_type("gemma3n_text", blocks=2), {("block.output", 0): Zero()}).__enter__()


def test_recorded_gradients_of_changed_states() -> None:
    model = tiny_model("llama")
    edit = Intervention(model, {("block.output", 1): Scale(2.0)})
    config = RecordingConfig(detach=False, retain_grad=True)
    with edit, HiddenStateRecorder(model, [1], sites=["block.output"], config=config) as record:
        model(IDS).logits.square().mean().backward()
    assert record.outputs[1][0].grad is not None


def test_indices_are_those_of_the_model_when_it_is_opened() -> None:
    model = tiny_model("llama")
    edit, recorder = Intervention(model, {("block.output", 2): Zero()}), HiddenStateRecorder(model, [2])
    late = Intervention(model, {("block.output", BLOCKS - 1): Zero()})
    with torch.no_grad(), LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        with edit, HiddenStateRecorder(model) as record:
            model(IDS)
        assert [bool((states[0] == 0).all()) for states in record.outputs.values()].index(True) == 2
        with pytest.raises(StreamlineError, match=str(BLOCKS - 1)), late:
            pass
        with pytest.raises(StreamlineError, match="Create it inside the surgery"), recorder:
            pass
    with edit, recorder:
        model(IDS)
    assert bool((recorder.outputs[2][0] == 0).all())


@pytest.mark.skipif("rwkv" not in causal_model_types(), reason="this Transformers has no RWKV")
def test_steps_of_a_model_whose_state_has_no_length_are_refused() -> None:
    model: Any = tiny_of_type("rwkv", blocks=3)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    edit = Intervention(model, {("block.output", 1): Zero()}, steps="prefill")
    with torch.no_grad(), pytest.raises(StreamlineError, match="steps"), edit:
        model.generate(IDS, **options)


@pytest.mark.parametrize("selected", ["real", "last"])
def test_a_mask_of_other_tokens_selects_no_states(selected: str) -> None:
    """The encoder computes one state of four frames, and the last columns of the mask are not about its states."""
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    limits = {"max_source_positions": 60, "max_target_positions": 16, "vocab_size": 128, "d_model": 16}
    config = Speech2TextConfig(
        encoder_layers=2,
        decoder_layers=2,
        input_feat_per_channel=8,
        conv_channels=16,
        num_conv_layers=2,
        **sizes,
        **limits,
    )
    model = Speech2TextForConditionalGeneration(config).eval()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 28:] = 0
    batch = {"input_features": torch.randn(2, 40, 8), "attention_mask": mask, "decoder_input_ids": tokens(2, 3)}
    record = HiddenStateRecorder(model, [0], stack="encoder", tokens=selected)  # type: ignore[arg-type]
    edit = Intervention(model, {("block.output", 0): Zero()}, stack="encoder", tokens=selected)
    for change in (record, edit):
        with torch.no_grad(), pytest.raises(StreamlineError, match=r"mask of the model.s call"), change:
            model(**batch)
    with torch.no_grad(), HiddenStateRecorder(model, [0], stack="decoder", tokens=selected) as decoder:  # type: ignore[arg-type]
        model(**batch)
    assert decoder.outputs[0][0].shape == ((6, 16) if selected == "real" else (2, 16))
