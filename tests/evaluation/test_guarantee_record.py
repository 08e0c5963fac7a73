"""A guarantee in the checkpoint and the card is about the saved weights, in their precision, and about no others."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError, compress, load, save
from streamline_hooks.core import state_digest
from streamline_hooks.evaluation import Guarantee, guarantee, record_guarantee
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model

DOCUMENTS = [torch.randint(3, 60, (6, 12), generator=torch.Generator().manual_seed(k)) for k in range(40)]
WARNING = "recorded bounds on its losses that were measured with other weights"


def measured(splice: bool = False, measure: Any = "disagreement") -> tuple[Any, Guarantee]:
    original = tiny_model("llama")
    compressed = copy.deepcopy(original)
    with LayerSurgeon(compressed) as surgeon:
        if splice:
            surgeon.replace(range(2, 4), LinearReplacement(32))
        else:
            surgeon.remove([3])
        surgeon.commit()
    return compressed, guarantee(original, compressed, DOCUMENTS, measure)


def card_of(model: nn.Module, folder: Path) -> str:
    return (save(model, folder, overwrite=True) / "README.md").read_text()


@pytest.mark.parametrize("splice", [False, True])
def test_a_statement_survives_saving_and_loading(splice: bool, tmp_path: Path, recwarn: Any) -> None:
    model, statement = measured(splice)
    record_guarantee(model, statement)
    record_guarantee(model, statement)  # again, which replaces it
    assert card_of(model, tmp_path / "a").count(f"- Bounded losses, relative to the original, {statement}.\n") == 1
    assert card_of(load(tmp_path / "a"), tmp_path / "b").count(str(statement)) == 1
    assert not [warning for warning in recwarn if WARNING in str(warning.message)]


def test_statements_of_two_measures_are_both_in_the_card(tmp_path: Path) -> None:
    model, first = measured()
    second = guarantee(tiny_model("llama"), model, DOCUMENTS, "kl")
    for statement in (first, second):
        record_guarantee(model, statement)
    card = card_of(model, tmp_path / "model")
    assert str(first) in card and str(second) in card


def add_noise(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.add_(1e-4)


def remove_another(model: Any) -> None:
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([0])
        surgeon.commit()


def compress_again(model: Any) -> None:
    compress(model, DOCUMENTS[:12], remove=1)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "noise": add_noise,
    "bfloat16": lambda model: model.bfloat16(),
    "another surgery": remove_another,
    "another compression": compress_again,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_statement_about_other_weights_is_left_out(name: str, tmp_path: Path) -> None:
    model, statement = measured()
    record_guarantee(model, statement)
    save(model, tmp_path / "before")
    loaded = load(tmp_path / "before")
    CHANGES[name](loaded)
    with pytest.warns(UserWarning, match=WARNING):
        card = card_of(loaded, tmp_path / "after")
    assert "Bounded losses" not in card and "## Guarantee" not in card
    assert "Bounded losses" in (tmp_path / "before" / "README.md").read_text()
    assert statement.weights not in (tmp_path / "after" / "config.json").read_text()


def test_a_limit_of_compress_is_left_out_after_a_change(tmp_path: Path) -> None:
    given: dict[str, Any] = {"remove": 4, "at_most": {"kl": 0.999}, "guarantee_data": {"kl": DOCUMENTS[12:]}}
    compress(tiny_model("llama"), DOCUMENTS[:12], **given, output=tmp_path / "model")
    assert "at most 0.999" in card_of(load(tmp_path / "model"), tmp_path / "same")
    with pytest.warns(UserWarning, match=WARNING):
        assert "at most 0.999" not in card_of(load(tmp_path / "model").half(), tmp_path / "half")


def test_a_record_of_an_earlier_version_is_not_repeated(tmp_path: Path) -> None:
    """It has no digest of its weights."""
    model, _ = measured()
    folder = save(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["streamline_hooks"]["history"][0]["guarantee"] = "relative to the original, at most 0.2"
    old = type(model).from_pretrained(None, config=type(model.config)(**config), state_dict=model.state_dict())
    with pytest.warns(UserWarning, match=WARNING):
        assert "at most 0.2" not in card_of(old, tmp_path / "again")


def test_only_the_measured_weights_get_a_statement() -> None:
    model, statement = measured()
    with pytest.raises(StreamlineError, match="no surgery was committed"):
        record_guarantee(tiny_model("llama"), statement)
    add_noise(model)
    with pytest.raises(StreamlineError, match="are not those of the statement"):
        record_guarantee(model, statement)
    unknown = Guarantee("kl", bound=0.2, losses=(0.1,), delta=0.05, fingerprint="8e1c")
    with pytest.raises(StreamlineError, match="were offloaded"):
        record_guarantee(model, unknown)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + torch.tanh(self.linear(states))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 8)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(8, 60)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = self.embedding(input_ids)
        for layer in self.layers:
            states = layer(states)
        return self.head(states)  # type: ignore[no-any-return]


def test_a_model_outside_transformers_keeps_its_statement(tmp_path: Path) -> None:
    torch.manual_seed(0)
    compressed = Blocks()
    with LayerSurgeon(compressed) as surgeon:
        surgeon.remove([3])
        surgeon.commit()
    given: dict[str, Any] = {"bound": 0.2, "losses": (0.1,), "delta": 0.05, "fingerprint": "8e1c"}
    statement = Guarantee("accuracy_drop", **given, weights=state_digest(compressed))
    record_guarantee(compressed, statement)
    assert str(statement) in card_of(compressed, tmp_path / "a")
    loaded = load(tmp_path / "a", into=Blocks())
    assert str(statement) in card_of(loaded, tmp_path / "b")
    with torch.no_grad():
        loaded.head.bias.add_(1)
    with pytest.warns(UserWarning, match=WARNING):
        assert "Bounded losses" not in card_of(loaded, tmp_path / "c")
