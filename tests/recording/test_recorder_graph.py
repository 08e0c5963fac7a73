"""States with their graph: auxiliary losses on them train what they should, and their gradients are kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from streamline_hooks import HiddenStateRecorder, StreamlineError, find_stack
from streamline_hooks.recording import RecordingConfig
from tests.tiny_models import BLOCKS, FAMILIES, WIDTH, padded, tiny_model, tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_auxiliary_loss_has_the_gradient_of_the_same_loss_without_hooks(family: str, side: str) -> None:
    """Against a forward that is cut short by hand: a loss on what enters block 3 is one on what block 2 leaves."""
    model = tiny_model(family)
    batch = padded([7, 4], side)
    with HiddenStateRecorder(model, [2, 3], config=RecordingConfig(detach=False)) as record:
        logits = model(**batch, use_cache=False).logits
    (record.outputs[2][0].square().mean() + logits.square().mean()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    states: list[torch.Tensor] = []
    block = find_stack(model)[3]
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: states.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    logits = model(**batch, use_cache=False).logits
    handle.remove()
    (states[0].square().mean() + logits.square().mean()).backward()
    assert found
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_states_are_kept(family: str) -> None:
    model = tiny_model(family)
    with HiddenStateRecorder(model, config=RecordingConfig(detach=False, retain_grad=True)) as record:
        loss = model(tokens(2, 7), use_cache=False).logits.square().mean()
    states = [record.inputs[0][0], *(record.outputs[k][0] for k in range(BLOCKS))]
    expected = torch.autograd.grad(loss, states, retain_graph=True)
    for state in states:
        state.grad = None  # which autograd.grad fills as well
    loss.backward()
    for state, gradient in zip(states, expected, strict=True):
        torch.testing.assert_close(state.grad, gradient)
        assert gradient.abs().sum() > 0
    assert all(torch.equal(record.inputs[k][0].grad, states[k].grad) for k in range(BLOCKS))  # one state, one gradient


def test_gradients_are_kept_under_gradient_checkpointing() -> None:
    model = tiny_model("llama").train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with HiddenStateRecorder(
            model, sites=["block.output"], config=RecordingConfig(detach=False, retain_grad=True)
        ) as record:
            model(tokens(2, 7), use_cache=False).logits.square().mean().backward()
        assert all(len(visits) == 1 for visits in record.outputs.values())
        found.append(torch.stack([record.outputs[k][0].grad for k in range(BLOCKS)]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("options", [{}, {"detach": False, "dtype": torch.float64}, {"detach": False, "device": "cpu"}])
def test_gradients_of_something_else_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(StreamlineError, match=r"retain_grad=True.*Expected detach=False"):
        RecordingConfig(retain_grad=True, **options)  # type: ignore[arg-type]
    with pytest.raises(StreamlineError, match=r"retain_grad=True.*Expected detach=False"):
        HiddenStateRecorder(tiny_model("llama"), tokens="last", config=RecordingConfig(detach=False, retain_grad=True))


def test_a_probe_and_the_model_learn_together() -> None:
    """A probe on block 2's exit must find what the token two places back was: block 2 and what is before it learn."""
    torch.manual_seed(0)
    model = copy.deepcopy(tiny_model("llama"))
    probe = nn.Linear(WIDTH, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([*model.parameters(), *probe.parameters()], lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(120):
        ids = torch.randint(3, 11, (16, 8))
        with HiddenStateRecorder(
            model, [2], sites=["block.output"], stop=True, config=RecordingConfig(detach=False)
        ) as record:
            record(input_ids=ids)
        loss = nn.functional.cross_entropy(
            probe(record.outputs[2][0][:, 2:]).flatten(0, 1), (ids[:, :-2] - 3).flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and losses[-1] < 1.2
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("model.layers.2.") for name in changed)
    assert not any(name.startswith(("model.layers.3.", "model.layers.5.", "model.norm")) for name in changed)


def test_self_distillation_teaches_an_early_exit() -> None:
    """The last block's state, through norm and head, teaches an earlier one; nothing but the student's side learns."""
    torch.manual_seed(0)
    model = copy.deepcopy(tiny_model("llama")).requires_grad_(False)
    for block in model.model.layers[:3]:
        block.requires_grad_(True)
    for block in model.model.layers[3:]:  # what is to be learned is near what is there
        for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            weight.mul_(0.3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(150):
        with HiddenStateRecorder(model, [2], sites=["block.output"], config=RecordingConfig(detach=False)) as record:
            teacher = model(torch.randint(3, 61, (8, 8)), use_cache=False).logits.detach()
        student = model.lm_head(model.model.norm(record.outputs[2][0]))
        loss = nn.functional.kl_div(
            student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
