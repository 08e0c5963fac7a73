"""Blocks go in the middle of a training, and everything else of it goes on."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack, load, save
from streamline_hooks.checkpoint import read_plans
from streamline_hooks.testing import tiny_model as tiny_of_type
from streamline_hooks.training.progressive_removal import ProgressiveRemoval, drop_parameters
from streamline_hooks.training.stochastic_depth import StochasticDepth
from tests.processes import in_two_processes
from tests.surgery.test_surgeon import fingerprint
from tests.tiny_models import BLOCKS, Nudge, left_padded, tiny_model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    loss = model(**left_padded(2, 7, step)).logits.square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def groups(model: nn.Module) -> list[dict[str, object]]:
    """As the Trainer makes them: weights decay, norms do not."""
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


def adam(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(model), lr=0.01)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# What goes, and what stays


def test_windows_are_in_the_numbering_of_the_start() -> None:
    model = tiny_model("llama").train()
    blocks = list(model.model.layers)
    removal = ProgressiveRemoval(model, {2: range(1, 2), 4: range(3, 5)})
    assert [removal.step(n) is not None for n in range(1, 6)] == [False, True, False, True, False]
    assert list(model.model.layers) == [blocks[0], blocks[2], blocks[5]]
    assert [done.blocks for done in removal.done] == [(1,), (3, 4)]
    assert [plan.removed for plan in read_plans(model)] == [(1,), (2, 3)]


def test_a_function_chooses_in_the_present_numbering() -> None:
    model, seen = tiny_model("llama").train(), []
    blocks = list(model.model.layers)

    def last(given: nn.Module) -> range:
        seen.append((given, len(given.model.layers)))
        return range(len(given.model.layers) - 2, len(given.model.layers) - 1)

    removal = ProgressiveRemoval(model, {1: range(3, 4), 2: last, 3: range(0, 1)})
    for n in range(1, 4):
        removal.step(n)
    assert seen == [(model, 5)] and [done.blocks for done in removal.done] == [(3,), (4,), (0,)]
    assert list(model.model.layers) == [blocks[1], blocks[2], blocks[5]]


def test_it_follows_what_somebody_else_did_in_between() -> None:
    model = tiny_model("llama").train()
    blocks = list(model.model.layers)
    removal = ProgressiveRemoval(model, {1: range(0, 1), 3: range(4, 5)})
    removal.step(1)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([0], Nudge())  # block 1 of the start
        surgeon.commit()
    removal.step(2)
    assert removal.step(3).blocks == (4,)  # type: ignore[union-attr]
    assert list(model.model.layers) == [blocks[2], blocks[3], blocks[5]]
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        surgeon.commit()
    with pytest.raises(StreamlineError, match=r"blocks 2, 3 .*: 3 were already removed"):
        ProgressiveRemoval(model, {1: range(0, 1), 3: range(4, 5), 5: range(2, 4)})
    again = ProgressiveRemoval(model, {1: range(0, 1), 3: range(4, 5), 5: range(2, 3)})
    again.resume(4)
    assert again.step(5).plan.removed == (0,)  # type: ignore[union-attr]
    assert list(model.model.layers) == [blocks[5]]


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_optimizer_goes_on_with_what_is_left(wrapped: bool) -> None:
    model = tiny_model("llama").train()
    optimizer = adam(model)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if wrapped:
        from accelerate import Accelerator

        model, prepared, scheduled = Accelerator(cpu=True).prepare(model, optimizer, schedule)
    else:
        prepared, scheduled = optimizer, schedule
    removal = ProgressiveRemoval(model, {2: range(2, 4)}, prepared)
    for n in (1, 2):
        train(model, prepared, n)
        scheduled.step()
    kept = [p for name, p in model.named_parameters() if ".2." not in name and ".3." not in name]
    gone = [p for name, p in model.named_parameters() if ".2." in name or ".3." in name]
    before = {p: {key: (value, value.clone()) for key, value in optimizer.state[p].items()} for p in kept}
    order = [[p for p in group["params"] if p in before] for group in optimizer.param_groups]
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    assert removal.step(2) is not None
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [list(map(id, g)) for g in order]
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == options
    assert set(optimizer.state) == set(kept) == set(model.parameters())
    for parameter, state in before.items():
        for key, (value, copied) in state.items():
            assert optimizer.state[parameter][key] is value and torch.equal(value, copied)
    left = [p.detach().clone() for p in gone]
    train(model, prepared, 3)
    scheduled.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[1]["lr"] == pytest.approx(0.01 / 4)
    assert all(torch.equal(a, b) for a, b in zip(left, gone, strict=True))
    assert all(optimizer.state[p]["step"] == 3 for p in kept)


def test_the_training_equals_one_of_the_shorter_model_with_the_same_optimizer_state() -> None:
    model = tiny_model("llama").train()
    optimizer = adam(model)
    removal = ProgressiveRemoval(model, {2: range(1, 3)}, optimizer)
    for n in (1, 2):
        train(model, optimizer, n)
    removal.step(2)
    short = tiny_model("llama").train()
    with LayerSurgeon(short) as surgeon:
        surgeon.remove(range(1, 3))
        surgeon.commit()
    short.load_state_dict(model.state_dict())
    other = adam(short)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which shares its tensors
    for n in (3, 4):
        assert train(model, optimizer, n) == train(short, other, n)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), short.parameters(), strict=True))


def test_a_group_that_is_left_empty_stays_for_the_schedule() -> None:
    model = tiny_model("llama").train()
    block = list(model.model.layers[2].parameters())
    rest = [p for p in model.parameters() if all(p is not own for own in block)]
    optimizer = torch.optim.AdamW([{"params": block, "lr": 0.1}, {"params": rest, "lr": 0.01}])
    schedule = LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5**step])
    removal = ProgressiveRemoval(model, {1: range(2, 3)}, optimizer)
    for n in (1, 2):
        train(model, optimizer, n)
        schedule.step()
        removal.step(n)
    assert [len(g["params"]) for g in optimizer.param_groups] == [0, len(rest)]
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.0025]


def test_the_memory_of_the_blocks_that_are_gone_is_given_back() -> None:
    model = tiny_model("llama").train()
    optimizer = adam(model)
    removal = ProgressiveRemoval(model, {1: range(2, 3)}, optimizer)
    train(model, optimizer, 1)
    parameter = model.model.layers[2].mlp.up_proj.weight
    watched = [weakref.ref(model.model.layers[2]), weakref.ref(optimizer.state[parameter]["exp_avg"])]
    del parameter
    removal.step(1)
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_together_with_stochastic_depth() -> None:
    model = tiny_model("llama").train()
    optimizer = adam(model)
    removal = ProgressiveRemoval(model, {2: range(1, 3)}, optimizer)
    with StochasticDepth(model, 0.5, rule="constant") as depth:
        for n in range(1, 6):
            train(model, optimizer, n)
            removal.step(n)
            assert len(model.model.layers) == (BLOCKS if n < 2 else BLOCKS - 2)
        assert max(depth.skipped, default=0) < BLOCKS - 2 == len(depth.rates)


def test_a_module_without_a_configuration() -> None:
    """What plain PyTorch trains; the model itself carries what was removed."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, other = (nn.TransformerEncoder(layer, 5, enable_nested_tensor=False) for _ in range(2))
    blocks, optimizer = list(model.layers), torch.optim.SGD(model.parameters(), 0.1)
    removal = ProgressiveRemoval(model, {1: range(1, 2), 2: range(3, 4)}, optimizer)
    removal.step(1), removal.step(2)
    assert list(model.layers) == [blocks[0], blocks[2], blocks[4]]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    again = ProgressiveRemoval(model, {1: range(1, 2), 2: range(3, 4), 4: range(0, 1)})
    again.resume(3)
    assert again.step(4).plan.removed == (0,)  # type: ignore[union-attr]
    with pytest.raises(StreamlineError, match=r"Save.*streamline_hooks.save"):
        ProgressiveRemoval(other, {1: range(1, 2), 4: range(0, 1)}).step(3)


# Resuming


def test_a_resumed_training_is_the_one_that_went_on(tmp_path: Path) -> None:
    schedule = {2: range(1, 3), 4: range(4, 5)}
    model = tiny_model("llama").train()
    optimizer = adam(model)
    removal = ProgressiveRemoval(model, schedule, optimizer)
    for n in range(1, 6):
        if n == 4:
            model.save_pretrained(tmp_path)
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        train(model, optimizer, n)
        removal.step(n)
    resumed = load(tmp_path).train()
    optimizer = adam(resumed)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    removal = ProgressiveRemoval(resumed, schedule, optimizer)
    assert [done.blocks for done in removal.done] == [(1, 2)]
    removal.resume(3)
    for n in (4, 5):
        train(resumed, optimizer, n)
        removal.step(n)
    assert [done.blocks for done in removal.done] == [(1, 2), (4,)]
    one, other = weights(model), weights(resumed)
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_shortened_weights_in_a_full_model_are_refused(tmp_path: Path) -> None:
    schedule = {2: range(1, 3), 4: range(4, 5)}
    model = tiny_model("llama").train()
    removal = ProgressiveRemoval(model, schedule)
    removal.step(1), removal.step(2)
    full = tiny_model("llama").train()
    full.load_state_dict(model.state_dict(), strict=False)  # silently: block 3 of the start is block 1 here
    words = r"2 steps.*after step 2.*6 blocks"
    with pytest.raises(StreamlineError, match=rf"{words}.*from_pretrained"):
        ProgressiveRemoval(full, schedule).step(3)
    with pytest.raises(StreamlineError, match=words):
        ProgressiveRemoval(full, schedule).resume(2)
    ProgressiveRemoval(full, schedule).resume(1)


def test_a_model_that_is_ahead_of_the_steps_is_refused() -> None:
    model = tiny_model("llama").train()
    removal = ProgressiveRemoval(model, {1: range(1, 3), 4: range(4, 5)})
    removal.step(1)
    words = r"0 steps.*its record.*after step 1"
    with pytest.raises(StreamlineError, match=rf"{words}.*run="):
        ProgressiveRemoval(model, {1: range(1, 3), 4: range(4, 5)}).step(1)
    with pytest.raises(StreamlineError, match=words.replace("0 steps", "2 steps")):
        ProgressiveRemoval(model, {4: range(4, 5)}).resume(2)
    with pytest.raises(StreamlineError, match=r"blocks 1.*2 were.*2.*3"):
        ProgressiveRemoval(model, {1: range(2, 4)}).step(2)
    second = ProgressiveRemoval(model, {1: range(2, 3)}, run="second")  # in the numbering of its own start
    assert second.step(1).blocks == (2,) and len(model.model.layers) == 3  # type: ignore[union-attr]
    assert read_plans(model)[-1].removed == (2,)


# What cannot be


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({}, "schedule is empty"),
        ({0: range(1, 2)}, r"step 0\..*from 1"),
        ({1: range(5, 8)}, r"\[5, 6, 7\] is not a window.*0 to 5"),
        ({1: range(1, 3), 2: range(2, 4)}, r"blocks 2 to 3 overlaps .*blocks 1 to 2"),
        ({1: range(0, 3), 2: range(3, 6)}, r"all 6 blocks.*Leave"),
    ],
)
def test_a_schedule_that_cannot_be(schedule: dict[int, range], words: str) -> None:
    with pytest.raises(StreamlineError, match=words):
        ProgressiveRemoval(tiny_model("llama"), schedule)


def test_steps_grow_and_pass_over_nothing() -> None:
    removal = ProgressiveRemoval(tiny_model("llama"), {3: range(1, 2)})
    removal.step(1)
    with pytest.raises(StreamlineError, match=r"step\(1\).*step\(1\)"):
        removal.step(1)
    with pytest.raises(StreamlineError, match=r"step\(4\).*step\(1\).*step 3"):
        removal.step(4)
    assert removal.step(2) is None and removal.step(3) is not None


def test_hazards_are_named_at_once_and_leave_no_trace() -> None:
    model = tiny_of_type("gemma3n_text").train()
    before = fingerprint(model)
    with pytest.raises(UnsupportedSurgery, match=r"Block 5.*block 5"):
        ProgressiveRemoval(model, {100: range(5, 6)})
    with pytest.raises(UnsupportedSurgery, match=r"embed_tokens_per_layer.weight"):
        ProgressiveRemoval(model, {100: range(1, 2)}, torch.optim.SGD(model.parameters(), 0.1))
    assert fingerprint(model) == before
    model = tiny_of_type("diffllama")
    with pytest.raises(UnsupportedSurgery, match=r"Block 0 .*lambda_init.*[^.]\. Choose other blocks\."):
        ProgressiveRemoval(model, {100: range(0, 1)})  # shows on commit only


def test_a_function_that_chooses_what_cannot_go_changes_nothing() -> None:
    model = tiny_model("llama")
    optimizer = adam(model)
    removal = ProgressiveRemoval(model, {1: lambda given: range(4, 9)}, optimizer)
    before, held = fingerprint(model), [list(g["params"]) for g in optimizer.param_groups]
    with pytest.raises(StreamlineError, match="is not a window of the stack"):
        removal.step(1)
    assert fingerprint(model) == before and removal.done == ()
    assert [list(map(id, g)) for g in held] == [list(map(id, g["params"])) for g in optimizer.param_groups]


def test_an_optimizer_of_something_else_is_refused() -> None:
    other = torch.optim.SGD(tiny_model("llama").parameters(), 0.1)
    with pytest.raises(StreamlineError, match=r"SGD.*LlamaForCausalLM"):
        ProgressiveRemoval(tiny_model("llama"), {1: range(1, 2)}, other)


def test_a_compiled_model_is_refused() -> None:
    model = tiny_model("llama")
    model.compile(backend="eager")
    with pytest.raises(StreamlineError, match="remove blocks of a compiled LlamaForCausalLM"):
        ProgressiveRemoval(model, {1: range(1, 2)})
    torch.compiler.reset()


# Parameter names of optimizers


def test_the_names_beside_the_parameters_are_those_of_what_is_left() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    optimizer = torch.optim.SGD(
        [{"params": list(model[:2].named_parameters())}, {"params": list(model[2:].named_parameters())}], lr=0.1
    )
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this version of torch keeps no names")
    names = {id(parameter): name for group in optimizer.param_groups for parameter, name in pairs(group)}
    drop_parameters(optimizer, [*model[1].parameters(), *model[2].parameters()])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]
    assert [group["param_names"] for group in optimizer.state_dict()["param_groups"]] == [
        ["0.weight", "0.bias"],
        ["3.weight", "3.bias"],
    ]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_names_are_those_of_the_shortened_model(prefix: str) -> None:
    """By which a state that is saved is read again."""
    model = tiny_model("llama").train()
    optimizer = torch.optim.AdamW([(f"{prefix}{name}", parameter) for name, parameter in model.named_parameters()])
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this version of torch keeps no names")
    removal = ProgressiveRemoval(model, {1: range(1, 2), 2: range(3, 5)}, optimizer)
    removal.step(1), removal.step(2)
    names = {parameter: f"{prefix}{name}" for name, parameter in model.named_parameters()}
    group = optimizer.param_groups[0]
    assert group["param_names"] == [names[parameter] for parameter in group["params"]]
    assert set(group["params"]) == set(names)


def pairs(group: dict[str, list]) -> zip:
    return zip(group["params"], group["param_names"], strict=True)


def test_an_optimizer_without_names_gains_none() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drop_parameters(optimizer, [model.bias])
    assert optimizer.param_groups[0]["params"] == [model.weight]
    assert "param_names" not in optimizer.param_groups[0]


# The start of a training run, in the history of the model


def remove_by_hand(model: nn.Module, *blocks: int) -> None:
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(blocks)
        surgeon.commit()


def plain() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)


def llama() -> nn.Module:
    return tiny_model("llama").train()


@pytest.mark.parametrize("make", [llama, plain])
@pytest.mark.parametrize("before", [0, 1])
def test_the_start_is_when_it_was_made_whoever_removes_first(make: Callable[[], nn.Module], before: int) -> None:
    """Before the start too, whose numbers do not count."""
    model = make()
    if before:
        remove_by_hand(model, 5)
    stack = find_stack(model)
    removal = ProgressiveRemoval(model, {2: range(1, 2), 3: range(3, 4)})
    removal.step(1)
    remove_by_hand(model, 0)
    assert removal.step(2).blocks == (1,) and removal.step(3).blocks == (3,)  # type: ignore[union-attr]
    left = [2, 4, 5][: 3 - before]
    assert list(find_stack(model).blocks) == [stack[k] for k in left]


@pytest.mark.parametrize("make", [llama, plain])
def test_two_at_once_have_each_its_own_start(make: Callable[[], nn.Module]) -> None:
    model = make()
    blocks = find_stack(model).blocks
    first = ProgressiveRemoval(model, {1: range(0, 1), 3: range(3, 4)}, run="first")
    early = ProgressiveRemoval(model, {2: range(1, 2)}, run="early")
    first.step(1), early.step(1)
    late = ProgressiveRemoval(model, {3: range(3, 4)}, run="late")  # its block 3 is 4 of the others
    first.step(2), early.step(2), late.step(2)
    assert list(find_stack(model).blocks) == [blocks[k] for k in (2, 3, 4, 5)]
    first.step(3)
    assert late.step(3).blocks == (3,)  # type: ignore[union-attr]
    assert list(find_stack(model).blocks) == [blocks[k] for k in (2, 5)]


def test_blocks_that_went_without_a_surgeon_are_noticed() -> None:
    model = llama()
    removal = ProgressiveRemoval(model, {1: range(1, 2)})
    del model.model.layers[0]
    with pytest.raises(StreamlineError, match=r"6 blocks.*5 were.*LayerSurgeon"):
        removal.step(1)


@pytest.mark.parametrize("make", [llama, plain])
def test_a_training_that_is_resumed_before_its_first_removal_knows_its_start(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    schedule = {3: range(1, 2), 4: range(3, 4)}
    model = make()
    removal = ProgressiveRemoval(model, schedule)
    remove_by_hand(model, 0)
    removal.step(1)
    save(model, tmp_path)
    for n in (2, 3, 4):
        removal.step(n)
    resumed = load(tmp_path, into=None if make is llama else make()).train()
    with pytest.raises(StreamlineError, match=r"0 steps.*'train"):
        ProgressiveRemoval(resumed, schedule).step(1)
    removal = ProgressiveRemoval(resumed, schedule)
    for n in (2, 3, 4):
        removal.step(n)
    one, other = model.state_dict(), resumed.state_dict()
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert ProgressiveRemoval(resumed, {1: range(1, 2)}, run="another").step(1).plan.removed == (1,)  # type: ignore[union-attr]


# Several processes

TWO_PROCESSES = """
    from torch.nn.parallel import DistributedDataParallel
    from streamline_hooks import StreamlineError
    from streamline_hooks.training.progressive_removal import ProgressiveRemoval
    from streamline_hooks.training import ProgressiveRemovalCallback
    from tests.tiny_models import tiny_model, tokens
    from transformers import Trainer, TrainingArguments

    model = tiny_model("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    removal = ProgressiveRemoval(model, {2: range(1, 3)}, optimizer)
    ddp = DistributedDataParallel(model)
    try:
        ProgressiveRemoval(ddp, {2: range(1, 3)}, optimizer)
    except StreamlineError as error:
        said["refused"] = str(error)

    def train(step):
        ddp(tokens(2, 7, seed=10 * step + rank)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for step in (1, 2):
        train(step)
        if step == 2:
            ddp = ddp.module
        removal.step(step)
    ddp = DistributedDataParallel(ddp)
    for step in (3, 4):
        train(step)
        removal.step(step)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    steps = sorted({int(state["step"]) for state in optimizer.state.values()})
    said |= {"blocks": len(model.model.layers), "equal": torch.equal(*both), "steps": steps}

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    args = TrainingArguments(f"{folder}/{rank}", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    data = [{"input_ids": row, "labels": row} for row in tokens(16, 7)]
    callback = ProgressiveRemovalCallback({2: range(1, 3)})
    trainer = Trainer(tiny_model("llama"), args, train_dataset=data, callbacks=[callback])
    try:
        trainer.train()
    except StreamlineError as error:
        said["trainer"] = str(error)
"""


def test_two_processes_unwrap_step_and_wrap_again(tmp_path: Path) -> None:
    for said in in_two_processes(TWO_PROCESSES, tmp_path):
        assert said["blocks"] == BLOCKS - 2 and said["equal"] and said["steps"] == [4]
        assert "DistributedDataParallel already" in said["refused"]
        assert "unwrap the model, call step" in said["refused"]
        assert "several processes" in said["trainer"] and "Train on one device" in said["trainer"]
