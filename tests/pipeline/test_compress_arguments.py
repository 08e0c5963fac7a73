"""The arguments of compress: config fields as keywords, kinds of data, and copies."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from streamline_hooks import (
    CompressionConfig,
    DataConfig,
    DistillationConfig,
    LinearConfig,
    RunOptions,
    StreamlineError,
    SwiGLUConfig,
    UnsupportedSurgery,
    compress,
    find_stack,
    load,
)
from streamline_hooks.core import model_digest
from streamline_hooks.repair import NoneConfig
from streamline_hooks.testing import tiny_model
from tests.configured import configured

BATCHES = list(torch.randint(3, 60, (32, 8), generator=torch.Generator().manual_seed(0)).split(2))
PARTS = {"calibration": BATCHES[:12], "validation": BATCHES[12:14], "test": BATCHES[14:]}
SMALL: dict[str, Any] = {
    "sequence_length": 64, "calibration_tokens": 1280, "validation_tokens": 320, "test_tokens": 320,
    "speed": False, "generation": False,
}  # fmt: skip


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def test_at_most_eight_parameters() -> None:
    assert len(inspect.signature(compress).parameters) <= 8


def test_keywords_are_fields_of_the_config() -> None:
    by_keyword = compress(tiny_model("llama"), PARTS, CompressionConfig(seed=3), remove=2)
    by_config = compress(tiny_model("llama"), PARTS, CompressionConfig(remove=2, seed=3))
    assert by_keyword.config == by_config.config and by_keyword.config.seed == 3
    assert_equal_weights(by_keyword.model, by_config.model)


def test_the_data_config_is_a_keyword_beside_the_data() -> None:
    """`data=` is the field of the config; the documents or batches themselves have no name."""
    data = DataConfig(sequence_length=8)
    assert compress(tiny_model("llama"), PARTS, remove=2, data=data).config.data == data
    with pytest.raises(TypeError):
        compress(tiny_model("llama"), data=PARTS, remove=2)


def test_an_unknown_keyword_is_refused_with_the_nearest_field() -> None:
    model = tiny_model("llama")
    with pytest.raises(StreamlineError, match="'romove' is unknown.*Did you mean 'remove'"):
        compress(model, PARTS, romove=2)
    assert len(find_stack(model)) == 8


def test_a_copy_is_compressed_and_the_model_is_left() -> None:
    model = tiny_model("llama")
    before, digest = weights(model), model_digest(model)
    result = compress(model, PARTS, remove=2, inplace=False)
    assert result.model is not model and len(find_stack(result.model)) == 6
    assert len(find_stack(model)) == 8 and model_digest(model) == digest
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in result.model.parameters())
    in_place = compress(model, PARTS, remove=2)
    assert in_place.model is model and len(find_stack(model)) == 6
    assert_equal_weights(in_place.model, result.model)


def test_rounds_on_a_copy_are_taught_by_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: Any = sys.modules["streamline_hooks.pipeline.compress"]
    compress_once, teachers = rounds.compress_once, []

    def watched(*given: Any, options: RunOptions, **more: Any) -> Any:
        teachers.append(options.teacher)
        return compress_once(*given, options=options, **more)

    monkeypatch.setattr(rounds, "compress_once", watched)
    model, training = tiny_model("llama"), DistillationConfig(validations=1)
    result = compress(model, PARTS, remove=2, rounds=2, repair=SwiGLUConfig(), distillation=training, inplace=False)
    assert teachers == [None, model] and len(find_stack(model)) == 8 and len(find_stack(result.model)) == 6


def test_batches_are_divided_in_their_order() -> None:
    found = compress(tiny_model("llama"), BATCHES, remove=2)
    wanted = compress(tiny_model("llama"), PARTS, remove=2)
    assert found.data == wanted.data and found.perplexities == wanted.perplexities
    assert_equal_weights(found.model, wanted.model)


def test_too_few_batches_are_refused() -> None:
    with pytest.raises(StreamlineError, match="Got 2 batches. Expected at least 3"):
        compress(tiny_model("llama"), BATCHES[:2], remove=2)


def test_a_data_set_is_its_column_of_text(story_model: tuple[Any, Any], story_texts: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    model, tokenizer = story_model
    config = configured(remove=1, **SMALL)
    table = datasets.Dataset.from_dict({"number": list(range(len(story_texts))), "text": story_texts})
    wanted = compress(model, story_texts, config, tokenizer=tokenizer, inplace=False)
    for data in (table, table.to_iterable_dataset()):
        found = compress(copy.deepcopy(model), data, config, tokenizer=tokenizer)
        assert found.data == wanted.data
        assert_equal_weights(found.model, wanted.model)
    with pytest.raises(StreamlineError, match=r"columns \['number', 'words'\].*column 'text'.*rename_column"):
        compress(model, table.rename_column("text", "words"), config, tokenizer=tokenizer)


def test_keywords_are_fields_of_the_run_options_too(tmp_path: Path) -> None:
    for k in range(2):
        compress(tiny_model("llama"), PARTS, remove=2 - k, output=tmp_path / "out", overwrite=True)
    assert len(find_stack(load(tmp_path / "out"))) == 7
    with pytest.raises(StreamlineError, match="is not empty.*overwrite=True"):
        compress(tiny_model("llama"), PARTS, remove=2, output=tmp_path / "out", options=RunOptions(overwrite=False))
    names = [{f.name for f in dataclasses.fields(kind)} for kind in (CompressionConfig, RunOptions)]
    assert names[0].isdisjoint(names[1])


def test_run_options_are_validated() -> None:
    with pytest.raises(StreamlineError, match="RunOptions: overwrite='yes'"):
        RunOptions(overwrite="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("repair", [LinearConfig(), SwiGLUConfig()], ids=lambda config: config.kind)
def test_a_splice_in_weights_of_4_bits_is_refused_before_the_ranking(repair: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model("llama").save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    with pytest.raises(
        UnsupportedSurgery, match=rf"'{repair.kind}' when the checkpoint is loaded.*none, scale or block"
    ):
        compress(model, PARTS, remove=2, repair=repair)
    assert len(find_stack(compress(model, PARTS, remove=2, repair=NoneConfig()).model)) == 6
