"""The published recipes against their formulas, written out anew with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, UnsupportedSurgery, measure_moments
from streamline_hooks.cli.short_forms import parse_replacement
from streamline_hooks.repair import BlockConfig, FeedForwardConfig, fit_windows, place
from streamline_hooks.repair.configs import GhostedConfig, LinearPatchConfig, ReplaceMeConfig
from streamline_hooks.repair.folded import measure_fold_moments
from streamline_hooks.repair.published.hadamard import hadamard
from streamline_hooks.testing import tiny_model

WINDOW = range(3, 6)


@pytest.fixture(scope="module")
def texts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (12, 14), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # padding never counts
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]


def states(model: Any, batches: list[dict[str, torch.Tensor]], places: tuple[int, ...]) -> list[list[np.ndarray]]:
    """What enters blocks, one array a sequence of its real tokens."""
    found: list[list[np.ndarray]] = [[] for _ in places]
    for batch in batches:
        with torch.no_grad(), HiddenStateRecorder(model, outputs=False) as record:
            record(**batch)
        for one, k in zip(found, places, strict=True):
            rows = zip(record.inputs[k][0], batch["attention_mask"].bool(), strict=True)
            one += [state[real].double().numpy() for state, real in rows]
    return found


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 32, 36, 40, 64, 384, 576, 768, 960, 1536, 2560, 3072])
def test_hadamard_matrices_are_of_signs_and_orthogonal(order: int) -> None:
    matrix = hadamard(order)
    assert matrix.shape == (order, order)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5), atol=1e-12)
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("order", [3, 6, 92, 50])
def test_an_order_without_a_construction_is_refused(order: int) -> None:
    with pytest.raises(StreamlineError, match=rf"Hadamard.*order {order} is"):
        hadamard(order)


def test_linear_patch_scales_the_rotated_channels(texts: list[dict[str, torch.Tensor]]) -> None:
    model = tiny_model("llama")
    (repair,) = fit_windows(model, [WINDOW], LinearPatchConfig(), texts[:2], texts[2:])
    before, after = states(model, texts, (WINDOW.start, WINDOW.stop))
    h = hadamard(32).numpy()
    ratios = [np.abs(y @ h).mean(0) / np.abs(x @ h).mean(0) for x, y in zip(before, after, strict=True)]
    wanted = h @ np.diag(np.mean(ratios, axis=0)) @ h.T
    found = np.eye(32) + repair.stand_in.projection.weight.detach().double().numpy().T
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(found, found.T, atol=1e-6)


def test_ghosted_is_least_squares_onto_the_gap_without_weights(texts: list[dict[str, torch.Tensor]]) -> None:
    model = tiny_model("llama")
    (repair,) = fit_windows(model, [WINDOW], GhostedConfig(), texts[:2], texts[2:])
    x, y = (np.concatenate(rows) for rows in states(model, texts, (WINDOW.start, WINDOW.stop)))
    wanted = np.linalg.solve(x.T @ x + 1e-6 * np.eye(32), x.T @ (y - x))
    np.testing.assert_allclose(repair.stand_in.projection.weight.detach().double().numpy().T, wanted, atol=1e-5)


def test_replace_me_is_least_squares_of_the_mlp_and_folded(texts: list[dict[str, torch.Tensor]]) -> None:
    model: Any = tiny_model("llama")
    (repair,) = fit_windows(model, [WINDOW], ReplaceMeConfig(), texts[:2], texts[2:])
    added: list[torch.Tensor] = []
    handle = model.model.layers[WINDOW.start - 1].mlp.register_forward_hook(lambda _m, _a, out: added.append(out))
    leaving, y = (np.concatenate(rows) for rows in states(model, texts, (WINDOW.start, WINDOW.stop)))
    handle.remove()
    real = [batch["attention_mask"].bool() for batch in texts]
    m = np.concatenate([out[mask].double().numpy() for out, mask in zip(added, real, strict=True)])
    wanted = np.linalg.lstsq(m, y - (leaving - m), rcond=None)[0]
    np.testing.assert_allclose(repair.stand_in.map.numpy(), wanted, atol=1e-3 * np.abs(wanted).max())
    down = model.model.layers[WINDOW.start - 1].mlp.down_proj.weight.detach().clone()
    with LayerSurgeon(model) as surgeon:
        place(surgeon, WINDOW, repair.stand_in)
        folded = model.model.layers[WINDOW.start - 1].mlp.down_proj.weight
        torch.testing.assert_close(folded, (repair.stand_in.map.float().T @ down), rtol=1e-3, atol=1e-3)
    with pytest.raises(UnsupportedSurgery, match="no block stands before"):
        fit_windows(model, [range(0, 2)], ReplaceMeConfig(), texts[:2], texts[2:])


@pytest.mark.parametrize("kind", ["ghosted", "replaceme", "linearpatch"])
def test_the_error_on_held_out_text_is_of_a_map_that_has_not_seen_it(
    texts: list[dict[str, torch.Tensor]], kind: str
) -> None:
    model = tiny_model("llama")
    (repair,) = fit_windows(model, [WINDOW], parse_replacement(kind), texts[:2], texts[2:])
    (without,) = fit_windows(
        model, [WINDOW], parse_replacement(kind), texts[:1], texts[1:2]
    )  # what is placed is fitted on both
    if kind == "replaceme":
        (sums,) = measure_fold_moments(model, texts[2:], [WINDOW])
        map_ = without.stand_in.map - torch.eye(32)
        seen = repair.stand_in.map - torch.eye(32)
        assert repair.stand_in.held_out_error == repair.repaired_error
    else:
        (sums,) = measure_moments(model, texts[2:], [WINDOW])
        map_, seen = (one.stand_in.projection.weight.detach().double().T for one in (without, repair))
    assert repair.repaired_error == pytest.approx(sums.error(map_), rel=1e-3)
    assert repair.repaired_error != pytest.approx(sums.error(seen), rel=0.01), "the two are told apart"


def test_the_feed_forward_network_starts_as_the_repository_has_it(texts: list[dict[str, torch.Tensor]]) -> None:
    model: Any = tiny_model("llama")
    model.config.initializer_range = 0.5
    (repair,) = fit_windows(model, [WINDOW], FeedForwardConfig(), texts[:2], texts[2:])
    module = repair.stand_in
    assert [tuple(p.shape) for p in module.parameters()] == [(128, 32), (128,), (32, 128), (32,)]
    assert sum(p.numel() for p in module.parameters()) == 8 * 32**2 + 5 * 32
    for layer in (module.up_proj, module.down_proj):
        assert layer.weight.std().item() == pytest.approx(0.5, rel=0.05)
        assert not layer.bias.any()
    state = torch.randn(2, 3, 32)
    u, d = module.up_proj, module.down_proj
    torch.testing.assert_close(module(state), (state @ u.weight.T + u.bias).clamp_min(0) @ d.weight.T + d.bias)


def test_an_inherited_block_can_be_left_as_it_is(texts: list[dict[str, torch.Tensor]]) -> None:
    model: Any = tiny_model("llama")
    (repair,) = fit_windows(model, [WINDOW], BlockConfig(solve=False), texts[:2], texts[2:])
    first = model.model.layers[WINDOW.start]
    assert repair.stand_in is not first
    assert all(torch.equal(a, b) for a, b in zip(repair.stand_in.parameters(), first.parameters(), strict=True))
