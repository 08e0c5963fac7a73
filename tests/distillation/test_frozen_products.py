"""Weights that are narrowed once: the same products to the bit, and nothing left behind."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks.cli import parse_healing
from streamline_hooks.core import HardwareConfig
from streamline_hooks.distillation.config import DistillationConfig
from streamline_hooks.distillation.healing import student_of
from streamline_hooks.distillation.optimizer import cached_autocast_weights
from streamline_hooks.distillation.train import train
from streamline_hooks.modeling import find_stack
from streamline_hooks.repair import SwiGLUConfig, fit_windows
from streamline_hooks.testing import tiny_model

training_module = import_module("streamline_hooks.distillation.train")  # the package has a function of this name

NARROW = torch.bfloat16


def _states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_autocast(bias: bool) -> None:
    layer = nn.Linear(16, 8, bias=bias).requires_grad_(False)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        given = _states(3, 5, 16).requires_grad_()
        with torch.autocast("cpu", NARROW):
            made = layer(given)
        made.float().square().sum().backward()
        assert given.grad is not None
        return made, given.grad

    expected = run()
    with cached_autocast_weights([layer], NARROW) as taken:
        assert taken == 2 * (16 * 8 + 8 * bias)
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[0].dtype == NARROW


@pytest.mark.parametrize("context", [nullcontext(), torch.autocast("cpu", torch.float16)])
def test_outside_autocast_of_its_dtype_a_layer_is_as_it_was(context: Any) -> None:
    layer, given = nn.Linear(16, 8).requires_grad_(False), _states(3, 16)
    with context:
        expected = layer(given)
        with cached_autocast_weights([layer], NARROW):
            assert torch.equal(layer(given), expected)


def test_what_is_trained_wide_or_elsewhere_stays() -> None:
    trained, wide = nn.Linear(4, 4), nn.Linear(4, 4).double().requires_grad_(False)
    narrow = nn.Linear(4, 4).to(NARROW).requires_grad_(False)
    elsewhere = nn.Linear(4, 4, device="meta").requires_grad_(False)
    with cached_autocast_weights([trained, wide, narrow, elsewhere], NARROW) as taken:
        assert taken == 0
        assert not any("forward" in layer.__dict__ for layer in (trained, wide, narrow, elsewhere))


def test_hooks_still_see_the_layer_and_an_error_leaves_nothing_behind() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False), []
    handle = model[0].register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    with pytest.raises(KeyboardInterrupt), cached_autocast_weights([model], NARROW), torch.autocast("cpu", NARROW):
        model(_states(2, 4))
        raise KeyboardInterrupt
    handle.remove()
    assert seen == [NARROW]
    assert "forward" not in model[0].__dict__
    assert model(_states(2, 4)).dtype == torch.float32


@pytest.mark.sample(1)
@pytest.mark.parametrize("heal", [None, "lora:rank=4", "partial:where=beside,count=1"])
def test_a_training_comes_to_the_same_weights_to_the_bit(monkeypatch: pytest.MonkeyPatch, heal: str | None) -> None:
    def trained() -> list[torch.Tensor]:
        model = tiny_model("llama")
        texts = [torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(k)) for k in range(4)]
        (repair,) = fit_windows(model, [range(2, 4)], SwiGLUConfig(), texts[:2], texts[2:])
        healing = None if heal is None else parse_healing(heal)
        student = student_of(find_stack(model), [(repair.window, repair.replacement_module)], healing, seed=3)
        settings = DistillationConfig(loss={"kl": 1.0, "lm": 1.0}, validations=1)
        train(student, texts[:3], texts[3:], settings, hardware=HardwareConfig(autocast="bfloat16"))
        assert not any("forward" in module.__dict__ for module in model.modules())
        return [parameter.detach().clone() for parameter in student.parameters().values()]

    used: list[int] = []

    def counted(modules: Any, dtype: Any) -> Any:
        used.append(1)
        return cached_autocast_weights(modules, dtype)

    monkeypatch.setattr(training_module, "cached_autocast_weights", counted)
    found = trained()
    monkeypatch.setattr(training_module, "cached_autocast_weights", lambda modules, dtype: nullcontext())
    expected = trained()
    assert used
    assert found
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
