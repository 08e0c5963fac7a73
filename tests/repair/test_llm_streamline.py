"""The replacements of LLM-Streamline's presets start as its repository has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamline_hooks import fit_windows
from streamline_hooks.repair import BlockConfig, FeedForwardConfig
from streamline_hooks.testing import tiny_model

WINDOW = range(3, 6)


@pytest.fixture(scope="module")
def texts() -> list[torch.Tensor]:
    return list(torch.randint(3, 60, (12, 14), generator=torch.Generator().manual_seed(0)).split(4))


def test_the_feed_forward_network_starts_as_the_repository_has_it(texts: list[torch.Tensor]) -> None:
    model: Any = tiny_model("llama")
    model.config.initializer_range = 0.5
    (repair,) = fit_windows(model, [WINDOW], FeedForwardConfig(), texts[:2], texts[2:])
    module = repair.replacement_module
    assert [tuple(p.shape) for p in module.parameters()] == [(128, 32), (128,), (32, 128), (32,)]
    assert sum(p.numel() for p in module.parameters()) == 8 * 32**2 + 5 * 32
    for layer in (module.up_proj, module.down_proj):
        assert layer.weight.std().item() == pytest.approx(0.5, rel=0.05)
        assert not layer.bias.any()
    state = torch.randn(2, 3, 32)
    u, d = module.up_proj, module.down_proj
    torch.testing.assert_close(module(state), (state @ u.weight.T + u.bias).clamp_min(0) @ d.weight.T + d.bias)


def test_an_inherited_block_can_be_left_as_it_is(texts: list[torch.Tensor]) -> None:
    model: Any = tiny_model("llama")
    (repair,) = fit_windows(model, [WINDOW], BlockConfig(solve=False), texts[:2], texts[2:])
    first = model.model.layers[WINDOW.start]
    assert repair.replacement_module is not first
    assert all(
        torch.equal(a, b) for a, b in zip(repair.replacement_module.parameters(), first.parameters(), strict=True)
    )
