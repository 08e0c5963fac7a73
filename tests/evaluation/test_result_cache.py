"""The cache of results, whose keys hold everything that a result depends on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.evaluation import ResultCache
from streamline_hooks.testing import tiny_model


def test_a_changed_model_is_measured_again(tmp_path: Path) -> None:
    """By the same cache object: a model that was changed in memory is another one."""
    model, cache = tiny_model("llama"), ResultCache(tmp_path / "results.json")
    assert cache.get(int, [model], lambda: 8)[0] == 8
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(2, 4))
        surgeon.commit()
    assert cache.get(int, [model], lambda: 6)[0] == 6
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    assert cache.get(int, [model], lambda: 5)[0] == 5
    model.generation_config.max_new_tokens = 3
    assert cache.get(int, [model], lambda: 4)[0] == 4
    assert cache.get(int, [model], lambda: pytest.fail("measured again"))[0] == 4
    assert cache.get(int, [tiny_model("llama")], lambda: pytest.fail("measured again"))[0] == 8


def test_parts_are_called_only_with_a_file(tmp_path: Path) -> None:
    asked = []

    def part() -> str:
        asked.append(1)
        return "a part"

    assert ResultCache(None).get(float, [part], lambda: 0.5)[0] == 0.5 and not asked
    cache = ResultCache(tmp_path / "results.json")
    assert cache.get(float, [part], lambda: 0.5)[0] == 0.5 and len(asked) == 1
    assert ResultCache(tmp_path / "results.json").get(float, ["a part"], lambda: pytest.fail("again"))[0] == 0.5


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(StreamlineError, match=r"other.json is not a result cache.*Choose another file"):
        ResultCache(tmp_path / "other.json")
