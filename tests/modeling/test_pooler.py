from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from streamline_hooks import LayerSurgeon, find_stack, load, save
from streamline_hooks.modeling.pooler import load_with_pooler, pooling_argument
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import assert_checkpoint_round_trip, assert_removal_equals_shorter_model
from tests.commands import run

SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
PICTURES = {"image_size": 16, "patch_size": 8}
IDS = {"input_ids": torch.arange(3, 15).reshape(2, 6)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
# By name: the class, its configuration, what it takes, and what it does not have by default.
CASES: dict[str, tuple[Any, Any, dict[str, torch.Tensor], bool]] = {
    "bert": (transformers.BertModel, lambda: transformers.BertConfig(vocab_size=20, **SMALL), IDS, False),
    "vit": (transformers.ViTModel, lambda: transformers.ViTConfig(**SMALL, **PICTURES), PIXELS, False),
    "data2vec": (
        transformers.Data2VecVisionModel,
        lambda: transformers.Data2VecVisionConfig(**SMALL, **PICTURES),
        PIXELS,
        True,
    ),
}


@pytest.fixture(params=CASES)
def unusual(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, torch.Tensor], bool]:
    """A model with a pooler where its class has none by default, or the other way round."""
    model_class, config, batch, pooled = CASES[request.param]
    torch.manual_seed(0)
    return model_class(config(), add_pooling_layer=pooled).eval(), batch, pooled


@pytest.mark.parametrize("spliced", [False, True])
def test_a_model_keeps_its_pooler_or_its_lack_of_one(
    unusual: tuple[Any, dict[str, torch.Tensor], bool],
    spliced: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, batch, pooled = unusual
    assert (model.pooler is not None) == pooled
    with LayerSurgeon(model) as surgeon:
        if spliced:
            surgeon.replace([1, 2], LinearReplacement(16))
        else:
            surgeon.remove([1, 2])
        surgeon.commit()
    with torch.no_grad():
        before = model(**batch)
        loaded = load(save(model, tmp_path))
        after = loaded(**batch)
    assert type(loaded) is type(model) and pooling_argument(loaded) == {"add_pooling_layer": pooled}
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)
    assert (after.pooler_output is not None) == pooled
    if pooled:
        assert torch.equal(after.pooler_output, before.pooler_output)
    code, out, err = run(["inspect", tmp_path], monkeypatch, capsys)
    assert code == 0 and f"{sum(p.numel() for p in model.parameters()):,} parameters" in out, err


def test_a_second_surgery_knows_of_the_first_models_pooler(
    unusual: tuple[Any, dict[str, torch.Tensor], bool], tmp_path: Path
) -> None:
    model, batch, pooled = unusual
    for edit in (lambda s: s.replace([1], LinearReplacement(16)), lambda s: s.remove([0])):
        with LayerSurgeon(model) as surgeon:
            edit(surgeon)
            surgeon.commit()
    loaded: Any = load(save(model, tmp_path))
    assert len(find_stack(loaded)) == 2 and (loaded.pooler is not None) == pooled
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_the_assertions_build_a_model_with_the_pooler_that_it_has(
    unusual: tuple[nn.Module, dict[str, torch.Tensor], bool],
) -> None:
    model, batch, _ = unusual
    assert_removal_equals_shorter_model(model, [1], batch)
    assert_checkpoint_round_trip(model, batch=batch)


def test_a_checkpoint_decides_unless_it_is_said(
    unusual: tuple[Any, dict[str, torch.Tensor], bool], tmp_path: Path
) -> None:
    model, _, pooled = unusual
    model.save_pretrained(tmp_path)
    found, info = load_with_pooler(transformers.AutoModel, tmp_path)
    assert (found.pooler is not None) == pooled and not info["missing_keys"] and not info["unexpected_keys"]
    other, info = load_with_pooler(transformers.AutoModel, tmp_path, add_pooling_layer=not pooled)
    assert (other.pooler is not None) != pooled
    assert {key.split(".")[0] for key in (*info["missing_keys"], *info["unexpected_keys"])} == {"pooler"}


def test_what_has_no_such_choice_is_loaded_as_it_is(tmp_path: Path) -> None:
    """A classifier makes its own encoder: that argument would be an error."""
    config = transformers.BertConfig(vocab_size=20, **SMALL)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    classifier, info = load_with_pooler(transformers.AutoModelForSequenceClassification, tmp_path)
    assert pooling_argument(classifier) == {}
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= set(info["missing_keys"])
