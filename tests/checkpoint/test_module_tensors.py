"""Saved tensors are compared with a model and copied into it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from streamline_hooks.checkpoint.module_tensors import SavedTensors
from streamline_hooks.core import StreamlineError

FILE = Path("model.safetensors")


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("shift", torch.zeros(3), persistent=False)


def test_no_memory_is_shared_with_the_file() -> None:
    """The file may be mapped into memory, and may be replaced later."""
    saved, model = SavedTensors(FILE, {"weight": torch.ones(3), "shift": torch.ones(3)}, {"shift"}, []), Shifted()
    saved.check_fit(model)
    saved.load_into(model)
    for value in saved.values.values():
        value.zero_()
    assert model.weight.tolist() == model.shift.tolist() == [1, 1, 1]


class Three(nn.Module):
    """Three linear maps. The first two are tied."""

    def __init__(self, all_tied: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(2, 2, bias=False) for _ in range(3))
        self.second.weight = self.first.weight
        if all_tied:
            self.third.weight = self.first.weight


def test_a_missing_tie_of_a_weight_with_two_names_is_refused() -> None:
    names = ["second.weight", "third.weight", "first.weight"]
    saved = SavedTensors(FILE, dict.fromkeys(names, torch.ones(2, 2)), set(), [names])
    saved.check_fit(Three(all_tied=True))
    with pytest.raises(StreamlineError, match=r"second\.weight and third\.weight are tied in the file, but not"):
        saved.check_fit(Three(all_tied=False))
