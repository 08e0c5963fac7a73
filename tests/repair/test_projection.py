"""The last projection by least squares, against numpy.linalg.lstsq, and what it says of its own error."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from streamline_hooks import find_stack
from streamline_hooks.repair.fit import ParallelReplacement, parallel_moments
from streamline_hooks.repair.inherited_blocks import inherit_blocks
from streamline_hooks.repair.least_squares import (
    RIDGES,
    ProjectionMoments,
    add_to_projection,
    is_solvable,
    merged_moments,
    ridge_maps,
    solve_least_squares,
    solve_projection,
)
from streamline_hooks.replacements import MLPReplacement
from streamline_hooks.surgery import ModelSource
from streamline_hooks.testing import tiny_model as any_model
from tests.repair.replacement_modules import FIT, HELD_OUT, error, leaving
from tests.tiny_models import WIDTH, tiny_model, tokens

WINDOW = range(1, 4)


def moments_of(
    model: nn.Module, fit: list[Any], held_out: list[Any], asked: list[ParallelReplacement]
) -> list[tuple[ProjectionMoments, ProjectionMoments]]:
    """Return the moments on both parts of each replacement."""
    with parallel_moments(ModelSource(model), fit, held_out, asked) as measured:
        return [pair for _, pair in measured]


def entering(model: nn.Module, batch: Any) -> torch.Tensor:
    return leaving(model, WINDOW, batch, None)


def double(model: nn.Module, batches: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The states before and after the window, and one over the norm of the latter."""
    x = torch.cat([entering(model, batch) for batch in batches]).double().numpy()
    y = torch.cat([leaving(model, WINDOW, batch) for batch in batches]).double().numpy()
    return x, y, 1 / np.linalg.norm(y, axis=-1, keepdims=True)


def test_a_network_without_a_map_has_the_least_squares_of_its_features() -> None:
    model = tiny_model("llama")
    module = MLPReplacement(WIDTH, 20, "relu", bias=True, linear=False)
    one = ParallelReplacement(WINDOW, (module,), False, module.down_proj)
    ((fit, held_out),) = moments_of(model, FIT, HELD_OUT, [one])
    add_to_projection(module.down_proj, solve_least_squares(fit, held_out, [0.0]).map)
    x, y, weight = double(model, [*FIT, *HELD_OUT])
    up = module.up_proj
    features = np.maximum(x @ up.weight.detach().double().numpy().T + up.bias.detach().double().numpy(), 0)
    features = np.concatenate([features, np.ones_like(features[:, :1])], axis=1)
    expected = np.linalg.lstsq(features * weight, (y - x) * weight, rcond=None)[0]
    np.testing.assert_allclose(module.down_proj.weight.detach().numpy().T, expected[:-1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(module.down_proj.bias.detach().numpy(), expected[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_an_inherited_block_has_the_least_squares_of_its_inherited_features(family: str) -> None:
    """The features are read where the original block computes them, and what it adds without its last projection."""
    model = tiny_model(family)
    block = inherit_blocks(find_stack(model), WINDOW)
    path = {"gpt2": "mlp.c_proj", "opt": "fc2", "llama": "mlp.down_proj"}[family]
    one = ParallelReplacement(WINDOW, (block,), True, block.get_submodule(path))
    ((fit, held_out),) = moments_of(model, FIT, HELD_OUT, [one])
    add_to_projection(block.get_submodule(path), solve_least_squares(fit, held_out, [0.0]).map)
    kept: list[torch.Tensor] = []
    own = find_stack(model)[WINDOW.start].get_submodule(path)
    handle = own.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    masks = [
        b["attention_mask"].bool() if isinstance(b, dict) else torch.ones_like(b).bool() for b in (*FIT, *HELD_OUT)
    ]
    for batch in (*FIT, *HELD_OUT):
        leaving(model, WINDOW, batch)
    handle.remove()
    pairs = zip(kept, masks, strict=True)
    features = torch.cat([f.reshape(*m.shape, -1)[m] for f, m in pairs]).double().detach().numpy()
    zeroed = copy.deepcopy(model)
    for parameter in find_stack(zeroed)[WINDOW.start].get_submodule(path).parameters():
        nn.init.zeros_(parameter)
    rest = torch.cat([leaving(zeroed, range(1, 2), b) for b in (*FIT, *HELD_OUT)]).double().numpy()
    _, y, weight = double(model, [*FIT, *HELD_OUT])
    has_bias = own.bias is not None
    features = np.concatenate([features, np.ones_like(features[:, :1])], axis=1) if has_bias else features
    expected = np.linalg.lstsq(features * weight, (y - rest) * weight, rcond=None)[0]
    solved = block.get_submodule(path)
    found = [solved.weight.detach() if family == "gpt2" else solved.weight.detach().T]
    found += [solved.bias.detach()[None]] if has_bias else []  # type: ignore[index]
    np.testing.assert_allclose(torch.cat(found).numpy(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "granite", "cohere", "gpt_neox", "qwen2"])
def test_the_error_that_is_told_is_the_error_that_is_there(model_type: str) -> None:
    """Granite multiplies what a branch adds: with the factor left out the error would be another one."""
    model = any_model(model_type)
    parts = [[torch.randint(3, 60, (4, 20), generator=torch.Generator().manual_seed(k))] for k in range(2)]
    block = inherit_blocks(find_stack(model), WINDOW)
    path = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h"}.get(model_type, "mlp.down_proj")
    one = ParallelReplacement(WINDOW, (block,), True, block.get_submodule(path))
    ((fit, held_out),) = moments_of(model, *parts, [one])
    assert held_out.unchanged == pytest.approx(error(model, WINDOW, block, parts[1]), rel=1e-4)
    assert held_out.removal == pytest.approx(error(model, WINDOW, None, parts[1]), rel=1e-4)
    solution = solve_projection(fit, held_out)
    on_fit = copy.deepcopy(block)
    add_to_projection(on_fit.get_submodule(path), next(ridge_maps(fit, [solution.ridge])))
    assert solution.held_out_error == pytest.approx(error(model, WINDOW, on_fit, parts[1]), rel=1e-3)
    add_to_projection(block.get_submodule(path), solution.map)
    step_0 = error(model, WINDOW, block, [*parts[0], *parts[1]])
    assert merged_moments(fit, held_out).error(solution.map) == pytest.approx(step_0, rel=1e-3)
    multiplier = getattr(model.config, "residual_multiplier", 1.0)
    if multiplier != 1.0:
        add_to_projection(block.get_submodule(path), (multiplier - 1) * solution.map)
        assert error(model, WINDOW, block, [*parts[0], *parts[1]]) != pytest.approx(step_0, rel=1e-3)


def test_a_norm_behind_the_projection_is_seen() -> None:
    model = tiny_model("gemma3")
    block = inherit_blocks(find_stack(model), WINDOW)
    one = ParallelReplacement(WINDOW, (block,), True, block.get_submodule("mlp.down_proj"))
    ((fit, held_out),) = moments_of(model, [tokens(2, 9)], [tokens(2, 8)], [one])
    assert fit.xx.shape == held_out.xx.shape == (0, 0)
    assert fit.unchanged == pytest.approx(error(model, WINDOW, block, [tokens(2, 9)]), rel=1e-5)


def moments(seed: int, count: int, noise: float, moved: float = 0.1) -> ProjectionMoments:
    """Features that explain what is lacking exactly, but for noise."""
    generator = torch.Generator().manual_seed(seed)
    f, x = (torch.randn(count, 6, generator=generator) for _ in range(2))
    y = x + moved * torch.randn(count, 6, generator=generator)
    made = y - f @ torch.linspace(-1, 1, 36).view(6, 6) - noise * torch.randn(count, 6, generator=generator)
    sums = ProjectionMoments(6, 6)
    sums.add(f, made, x, y)
    return sums


def test_a_smaller_ridge_is_taken_where_the_best_held_out_one_leaves_more_than_plain_removal() -> None:
    fit, held_out = moments(0, 3, 3.0), moments(1, 2, 3.0)  # no more tokens than features
    everything, best = merged_moments(fit, held_out), solve_least_squares(fit, held_out)
    assert everything.error(best.map) > everything.removal
    chosen = solve_projection(fit, held_out)
    assert chosen.ridge < best.ridge and everything.error(chosen.map) <= everything.removal
    easy = moments(0, 400, 0.01), moments(1, 400, 0.01)
    assert solve_projection(*easy).ridge == solve_least_squares(*easy).ridge


def test_the_best_held_out_ridge_is_kept_where_it_is_not_above_plain_removal() -> None:
    few = moments(1, 8, 1.0, moved=5.0), moments(2, 8, 1.0, moved=5.0)
    best = solve_least_squares(*few)
    assert best.ridge > min(RIDGES) and merged_moments(*few).error(best.map) <= merged_moments(*few).removal
    assert solve_projection(*few).ridge == best.ridge


def test_no_ridge_may_be_below_plain_removal() -> None:
    """The window changes hardly anything, and the features say nothing of what the stand-in lacks."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    parts = []
    for _ in range(2):
        sums = ProjectionMoments(6, 6)
        sums.add(torch.randn(200, 6, generator=generator), x + torch.randn(200, 6, generator=generator), x, x + 1e-3)
        parts.append(sums)
    chosen = solve_projection(*parts)
    assert merged_moments(*parts).removal < merged_moments(*parts).error(chosen.map) <= merged_moments(*parts).unchanged


def test_the_errors_are_relative_however_small_the_states_are() -> None:
    one, small = ProjectionMoments(6, 6), ProjectionMoments(6, 6)
    f, made, x, y = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one.add(f, made, x, y)
    small.add(1e-6 * f, 1e-6 * made, 1e-6 * x, 1e-6 * y)
    assert (small.unchanged, small.removal) == pytest.approx((one.unchanged, one.removal))
    torch.testing.assert_close(small.xx, one.xx)
    torch.testing.assert_close(small.xd, one.xd)


def test_sums_merge_and_are_kept() -> None:
    parts = [moments(k, 10, 1.0) for k in range(2)]
    again = ProjectionMoments(6, 6)
    again.load_state_dict(merged_moments(*parts).state_dict())
    assert (again.removal, again.unchanged, again.tokens) == (
        merged_moments(*parts).removal,
        merged_moments(*parts).unchanged,
        parts[0].tokens + parts[1].tokens,
    )


def test_what_can_be_solved_for() -> None:
    class Same(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input @ self.weight.T + self.bias

    class Rounded(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward((input * 8).round() / 8)

    class Pair(nn.Linear):
        def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return super().forward(one + other)

    whole = nn.Linear(3, 4)
    whole.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    assert all(map(is_solvable, (nn.Linear(3, 4), Conv1D(4, 3), Same(3, 4), Same(3, 4).to(torch.bfloat16))))
    others = (Rounded(3, 4), Pair(3, 4), parametrized, whole, nn.Embedding(3, 4), nn.LayerNorm(4), nn.Conv1d(3, 4, 1))
    assert not any(map(is_solvable, others))
