"""Windows are replaced during a training run: the fit, the optimizer's groups, and a resumed run."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from streamline_hooks import LayerSurgeon, LinearConfig, StreamlineError, SwiGLUConfig, UnsupportedSurgery, load, save
from streamline_hooks.repair import (
    BlockConfig,
    FoldedConfig,
    MergedConfig,
    MLPConfig,
    ReplacementConfig,
    SilencedConfig,
    fit_windows,
)
from streamline_hooks.training import ProgressiveRemoval
from tests.tiny_models import WIDTH, Nudge, left_padded, tiny_model

SCHEDULE = {2: range(1, 3), 4: range(4, 6)}
STEPS = 6
FIT = [left_padded(3, 12, seed) for seed in (100, 101)]
HELD_OUT = [left_padded(3, 12, seed) for seed in (102, 103)]


def dropping(dtype: torch.dtype = torch.float32, family: str = "gpt2") -> nn.Module:
    """A model whose training draws random numbers."""
    model = tiny_model(family, dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return model


def split(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0, "lr": 0.02},
    ]


def adam(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(split(model), lr=0.01, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    loss = model(**left_padded(2, 7, step)).logits.float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def replacing(model: nn.Module, optimizer: torch.optim.Optimizer | None, **options: Any) -> ProgressiveRemoval:
    settings = {"replacement": LinearConfig(), "fit": FIT, "held_out": HELD_OUT, **options}
    return ProgressiveRemoval(model, settings.pop("schedule", SCHEDULE), optimizer, **settings)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the weights and the optimizer's moments by name."""
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = parameter.detach().clone()
        state |= {f"{name}:{key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return state


def options_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the options of each parameter by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {k: v for k, v in group.items() if not k.startswith(("params", "param_", "streamline"))}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def require_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert list(first) == list(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different and all(first[name].dtype == second[name].dtype for name in first)


Run = tuple[nn.Module, torch.optim.Optimizer, LambdaLR]


def run_of(model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer]) -> Run:
    optimizer = make(model)
    return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def write(folder: Path, run: Run) -> None:
    model, optimizer, schedule = run
    save(model, folder) if "history" in str(getattr(model.config, "streamline_hooks", "")) else model.save_pretrained(
        folder
    )
    parts = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "random": torch.get_rng_state()}
    torch.save(parts, folder / "training.pt")


def continued(run: Run, removal: ProgressiveRemoval, steps: range, folder: Path | None = None) -> Iterator[Any]:
    """Train, and yield the loss and the state after each step."""
    model, optimizer, schedule = run
    for step in steps:
        loss = train(model, optimizer, step)
        schedule.step()
        removal.step(step)
        if folder is not None:
            write(folder / str(step), run)
        yield loss, state_of(model, optimizer), options_of(model, optimizer)


def resumed(
    folder: Path, step: int, make: Callable[[nn.Module], torch.optim.Optimizer], **options: Any
) -> tuple[Run, ProgressiveRemoval]:
    run = run_of(load(folder / str(step)).train(), make)
    removal = replacing(run[0], run[1], **options)
    parts = torch.load(folder / str(step) / "training.pt")
    run[1].load_state_dict(parts["optimizer"])
    run[2].load_state_dict(parts["schedule"])
    torch.set_rng_state(parts["random"])
    removal.resume(step)
    return run, removal


CASES = {
    "linear": (lambda: dropping(), adam, LinearConfig()),
    "swiglu-fused": (lambda: tiny_model("llama").train(), lambda m: adam(m, fused=True), SwiGLUConfig(width=8)),
    "block": (lambda: dropping(), adam, BlockConfig()),
    "bfloat16": (lambda: dropping(torch.bfloat16), adam, MLPConfig(width=8, bias=True)),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_at_any_step_equals_the_uninterrupted_run(case: str, tmp_path: Path) -> None:
    make_model, make_optimizer, config = CASES[case]
    torch.manual_seed(0)
    run = run_of(make_model(), make_optimizer)
    removal = replacing(run[0], run[1], replacement=config)
    whole = list(continued(run, removal, range(1, STEPS + 1), tmp_path))
    assert [done.blocks for done in removal.done] == [(1, 2), (4, 5)]
    assert {id(p) for g in run[1].param_groups for p in g["params"]} == {id(p) for p in run[0].parameters()}
    for step in range(1, STEPS):
        run, again = resumed(tmp_path, step, make_optimizer, replacement=config)
        require_equal(state_of(run[0], run[1]), whole[step - 1][1])
        for expected, present in zip(whole[step:], continued(run, again, range(step + 1, STEPS + 1)), strict=True):
            assert present[0] == expected[0]
            require_equal(present[1], expected[1])
            assert present[2] == expected[2]
        assert again.done == removal.done


def backwards(model: nn.Module) -> torch.optim.AdamW:
    """The same parameters with the groups swapped and in another order."""
    groups = [{**group, "params": group["params"][::-1]} for group in reversed(split(model))]
    return torch.optim.AdamW(groups, lr=0.01)


def test_the_order_of_the_groups_is_restored_with_the_state(tmp_path: Path) -> None:
    """PyTorch gives the n-th state to the n-th parameter, also where the shapes differ."""
    run = run_of(tiny_model("llama").train(), adam)
    whole = list(continued(run, replacing(run[0], run[1]), range(1, STEPS + 1), tmp_path))
    swapped, removal = resumed(tmp_path, 3, backwards)
    require_equal(state_of(swapped[0], swapped[1]), whole[2][1])
    assert options_of(swapped[0], swapped[1]) == whole[2][2]
    rest = list(continued(swapped, removal, range(4, STEPS + 1)))
    require_equal(rest[-1][1], whole[-1][1])

    model = load(tmp_path / "3").train()
    optimizer = torch.optim.AdamW([{**g, "params": g["params"][::-1]} for g in split(model)], lr=0.01)
    optimizer.load_state_dict(torch.load(tmp_path / "3" / "training.pt")["optimizer"])
    with pytest.raises(StreamlineError, match=r"another order.*before optimizer.load_state_dict"):
        replacing(model, optimizer)


def test_a_state_of_another_step_is_refused(tmp_path: Path) -> None:
    run = run_of(tiny_model("llama").train(), adam)
    list(continued(run, replacing(run[0], run[1]), range(1, 5), tmp_path))
    other = run_of(load(tmp_path / "1").train(), adam)
    replacing(other[0], other[1])
    with pytest.raises(StreamlineError, match="the same step"):
        other[1].load_state_dict(torch.load(tmp_path / "3" / "training.pt")["optimizer"])


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.test_progressive_replacement import *
torch.manual_seed(0)
run = run_of(dropping(), adam)
for number, _ in enumerate(continued(run, replacing(run[0], run[1]), range(1, 7), Path(sys.argv[1])), start=1):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.long
def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ, check=False)
    assert process.returncode == -signal.SIGKILL
    torch.manual_seed(0)
    run = run_of(dropping(), adam)
    whole = list(continued(run, replacing(run[0], run[1]), range(1, STEPS + 1)))
    run, removal = resumed(tmp_path, 3, adam)
    rest = list(continued(run, removal, range(4, STEPS + 1)))
    assert [loss for loss, *_ in rest] == [loss for loss, *_ in whole[3:]]
    require_equal(rest[-1][1], whole[-1][1])


def test_the_fit_sees_the_model_of_its_step_and_draws_no_random_numbers() -> None:
    model = dropping(torch.bfloat16)
    optimizer = adam(model)
    removal = replacing(model, optimizer)
    originals = copy.deepcopy(model)
    for step in range(1, 5):
        train(model, optimizer, step)
        before, random = copy.deepcopy(model), torch.get_rng_state()
        done = removal.step(step)
        assert torch.equal(torch.get_rng_state(), random) and all(m.training for m in model.modules())
        if done is None:
            continue
        window = range(done.plan.removed[0], done.plan.removed[-1] + 1)
        (expected,) = fit_windows(before, [window], LinearConfig(), FIT, HELD_OUT)
        (early,) = fit_windows(originals, [SCHEDULE[step]], LinearConfig(), FIT, HELD_OUT)
        block = model.transformer.h[min(window.start, len(model.transformer.h) - 1)]
        (module,) = getattr(block, "spliced_before" if step == 2 else "spliced_after")
        weight = module.projection.weight
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected.replacement_module.projection.weight)
        assert not torch.equal(weight, early.replacement_module.projection.weight)  # type: ignore[union-attr]
        assert (done.removal_error, done.repaired_error) == (expected.removal_error, expected.repaired_error)
        assert done.replacement == LinearConfig(seed=step)


def test_padding_is_not_fitted() -> None:
    """Left padding of other widths and with other tokens gives the same replacement."""
    maps = []
    for width, filler in ((2, 0), (5, 7)):
        model = tiny_model("llama").train()
        batches = []
        for seed in (1, 2):
            ids = left_padded(1, 9, seed)["input_ids"]
            padding = torch.full((1, width), filler)
            mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], dim=1)
            batches.append({"input_ids": torch.cat([padding, ids], dim=1), "attention_mask": mask})
        removal = replacing(model, adam(model), fit=batches[:1], held_out=batches[1:], schedule={1: range(1, 3)})
        removal.step(1)
        maps.append(model.model.layers[1].spliced_before[0].projection.weight)
    assert torch.allclose(*maps, atol=1e-5)


# The groups of the optimizer


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_replacement_is_trained_with_the_options_of_what_it_replaces(wrapped: bool) -> None:
    model, optimizer = tiny_model("llama").train(), None
    optimizer = prepared = adam(model)
    if wrapped:
        from accelerate import Accelerator

        model, prepared = Accelerator(cpu=True).prepare(model, optimizer)
    removal = replacing(model, prepared, replacement=SwiGLUConfig(width=8))
    removed = list(model.model.layers[1].parameters())
    for step in range(1, 5):
        train(model, prepared, step)
        removal.step(step)
        if step == 2:
            module = model.model.layers[1].spliced_before[0]
            inserted = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert [sum(p is q for g in optimizer.param_groups for q in g["params"]) for p in module.parameters()] == [1] * 5
    for name, parameter in module.named_parameters():
        group = next(g for g in optimizer.param_groups if any(parameter is p for p in g["params"]))
        assert group["weight_decay"] == (0.0 if name == "norm.weight" else 0.1)
        assert optimizer.state[parameter]["step"] == 2 and not torch.equal(parameter, inserted[name])
    assert not any(p in optimizer.state for p in removed)
    assert set(optimizer.state) <= set(model.parameters())


@pytest.mark.parametrize("config", [BlockConfig(count=2), MergedConfig()])
def test_a_copy_joins_the_group_of_its_original(config: ReplacementConfig) -> None:
    model = tiny_model("llama").train()
    groups = [{"params": list(block.parameters()), "lr": 0.1 + k} for k, block in enumerate(model.model.layers)]
    blocks = {id(p) for group in groups for p in group["params"]}
    groups.append({"params": [p for p in model.parameters() if id(p) not in blocks], "lr": 10})
    optimizer = torch.optim.SGD(groups)
    replacing(model, optimizer, replacement=config, schedule={1: range(1, 4)}).step(1)
    rates = [
        g["lr"] for b in model.model.layers for g in optimizer.param_groups if b.mlp.up_proj.weight in set(g["params"])
    ]
    assert rates == ([0.1, 1.1, 2.1, 4.1, 5.1] if config.slots == 2 else [0.1, 1.1, 4.1, 5.1])


def test_other_weights_join_the_group_with_most_elements() -> None:
    model = tiny_model("llama").train()
    attention = [p for name, p in model.named_parameters() if "self_attn" in name]
    rest = [p for name, p in model.named_parameters() if "self_attn" not in name]
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [{"params": [(names[id(p)], p) for p in attention]}, {"params": [(names[id(p)], p) for p in rest], "lr": 0.5}]
    )
    replacing(model, optimizer, schedule={1: range(1, 3)}).step(1)
    weight = model.model.layers[1].spliced_before[0].projection.weight
    assert [sum(weight is p for p in g["params"]) for g in optimizer.param_groups] == [0, 1]
    present = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:  # also PyTorch's own names
        assert group["param_names"] == group["streamline_hooks_names"] == [present[id(p)] for p in group["params"]]


def test_names_follow_a_surgery_by_hand() -> None:
    model = tiny_model("llama").train()
    optimizer = adam(model)
    removal = replacing(model, optimizer, schedule={1: range(1, 3), 9: range(4, 6)})
    removal.step(1)
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(0, Nudge())
        surgeon.commit()
    removal.step(2)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["streamline_hooks_names"] == [names[id(p)] for p in group["params"]]


# What is refused


def test_frozen_blocks_are_refused() -> None:
    model = tiny_model("llama").train()
    for parameter in model.model.layers[2].mlp.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(UnsupportedSurgery, match=r"mlp.gate_proj.weight of block 2.*frozen"):
        replacing(model, optimizer)
    before = [list(map(id, group["params"])) for group in optimizer.param_groups]
    removal = replacing(model, optimizer, schedule={1: lambda model: range(1, 3)})
    with pytest.raises(UnsupportedSurgery, match="frozen"):
        removal.step(1)
    assert len(model.model.layers) == 6 and before == [list(map(id, g["params"])) for g in optimizer.param_groups]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replacement": FoldedConfig()}, "weights of blocks that stay"),
        ({"replacement": SilencedConfig()}, "frozen weights"),
        ({"replacement": BlockConfig(count=2)}, "2 inherited blocks cannot replace"),
        ({"fit": None}, r"without fit\..*optimizer, fit and held_out"),
    ],
)
def test_replacements_that_cannot_be_trained_or_resumed(options: dict[str, Any], words: str) -> None:
    model = tiny_model("llama").train()
    with pytest.raises(StreamlineError, match=words):
        replacing(model, adam(model), **options)
    assert len(model.model.layers) == 6


def test_the_optimizer_is_required() -> None:
    with pytest.raises(StreamlineError, match="without optimizer"):
        replacing(tiny_model("llama"), None)


def test_a_resumed_run_needs_the_same_replacement_and_batches() -> None:
    model = tiny_model("llama").train()
    optimizer = adam(model)
    replacing(model, optimizer, schedule={1: range(1, 3)}).step(1)
    for options, words in [
        ({"replacement": LinearConfig(rank=4)}, r"were replaced by LinearConfig.*rank=4"),
        ({"replacement": None, "fit": None, "held_out": None}, r"replacement=None"),
        ({"fit": FIT[::-1]}, "other batches"),
    ]:
        again = replacing(model, optimizer, **{"schedule": {1: range(1, 3)}, **options})
        with pytest.raises(StreamlineError, match=words):
            again.resume(1)
    replacing(model, optimizer, schedule={1: range(1, 3)}).resume(1)
    assert model.model.layers[1].spliced_before[0].projection.weight.shape == (WIDTH, WIDTH)
