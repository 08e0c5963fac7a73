"""All functions that take data accept the same kinds of data, and give the same results for each."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch

from streamline_hooks import CompressionConfig, DistillationConfig, StreamlineError, compress, profile, sweep
from streamline_hooks.evaluation import Suite
from streamline_hooks.pipeline import CostEstimate, estimate_cost, plan_training
from streamline_hooks.repair import NoneConfig
from streamline_hooks.testing import tiny_model
from tests.configured import configured

BATCHES = list(torch.randint(3, 60, (32, 8), generator=torch.Generator().manual_seed(0)).split(2))
PARTS = {"calibration": BATCHES[:12], "validation": BATCHES[12:14], "test": BATCHES[14:]}
CONFIG = configured(
    remove=2, sequence_length=16, calibration_tokens=320, validation_tokens=64, test_tokens=64, speed=False,
    generation=False,
)  # fmt: skip
RANDOM = Random(0)
WORDS = ("the", "cat", "saw", "a", "big", "dog", "and", "ran", "to", "Tom")
TEXTS = [" ".join(RANDOM.choices(WORDS, k=40)) for _ in range(30)]


def letters(text: str, **options: Any) -> dict[str, list[int]]:
    """A tokenizer with one token per letter."""
    return {"input_ids": [3 + ord(letter) % 50 for letter in text]}


def swept(data: Any, config: CompressionConfig, tokenizer: Any) -> Any:
    return sweep(
        tiny_model("llama"), data, config, remove=[2], repair=[NoneConfig()], tokenizer=tokenizer, speed=None
    ).points


def compressed(data: Any, config: CompressionConfig, tokenizer: Any) -> Any:
    result = compress(tiny_model("llama"), data, config, tokenizer=tokenizer)
    return result.data, result.perplexities, str(result.plan)


def estimated(data: Any, config: CompressionConfig, tokenizer: Any) -> Any:
    estimate = estimate_cost(tiny_model("llama"), tokenizer, data, config)
    assert isinstance(estimate, CostEstimate)
    return [(stage.name, stage.tokens) for stage in estimate.stages]


@pytest.mark.sample(1)
@pytest.mark.parametrize("function", [swept, compressed, estimated])
def test_a_list_of_batches_is_divided_as_by_compress(function: Callable[..., Any]) -> None:
    config = CompressionConfig(remove=2).updated({"evaluation.speed": False, "evaluation.generation": False})
    assert function(BATCHES, config, None) == function(PARTS, config, None)


@pytest.mark.parametrize("function", [swept, compressed, estimated])
def test_a_data_set_is_its_column_of_text(function: Callable[..., Any]) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"number": list(range(len(TEXTS))), "text": TEXTS})
    assert function(table, CONFIG, letters) == function(TEXTS, CONFIG, letters)
    with pytest.raises(StreamlineError, match="columns.*Expected a column 'text'.*rename_column"):
        function(table.rename_column("text", "words"), CONFIG, letters)


def test_a_plan_takes_documents_only() -> None:
    datasets = pytest.importorskip("datasets")
    recipe = CompressionConfig(remove=2, distillation=DistillationConfig({"kl": 1.0}))
    for data in (BATCHES, PARTS):
        with pytest.raises(StreamlineError, match="parts of given sizes. Expected documents.*datasets.Dataset"):
            plan_training(tiny_model("llama"), data, 60.0, recipe, tokenizer=letters)  # type: ignore[arg-type]
    table = datasets.Dataset.from_dict({"text": TEXTS}).rename_column("text", "words")
    with pytest.raises(StreamlineError, match="Expected a column 'text'"):
        plan_training(tiny_model("llama"), table, 60.0, recipe, tokenizer=letters)  # type: ignore[arg-type]


def test_a_suite_takes_a_data_set() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": TEXTS})
    content = [Suite(text={"words": data}, timed=None).read(letters).text for data in (TEXTS, table)]
    assert content[0] == content[1] == {"words": TEXTS}


def test_a_profile_takes_batches_only() -> None:
    for data in (TEXTS, PARTS):
        with pytest.raises(StreamlineError, match="profile: batches=.*Pass a list of batches"):
            profile(tiny_model("llama"), data)  # type: ignore[arg-type]
