"""A window is fitted again only from the same original and the same text, and comes out plain."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import (
    FoldedConfig,
    LayerSurgeon,
    LinearConfig,
    LinearReplacement,
    StreamlineError,
    compress,
    load,
    read_plans,
    save,
)
from streamline_hooks.cli import app
from streamline_hooks.cli.short_forms import parse_replacement
from streamline_hooks.export import refit, require_plain
from tests.configured import configured

SPLIT = {"sequence_length": 64, "calibration_tokens": 4096, "validation_tokens": 512, "test_tokens": 1024}


@pytest.fixture(scope="module")
def folder(stories: tuple[Any, Any], story_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model with a splice in the place of two blocks."""
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    target = tmp_path_factory.mktemp("refit") / "spliced"
    compress(model, tokenizer, story_texts, configured(remove=2, keep=[0], repair="linear", **SPLIT), output=target)
    return target


@pytest.mark.parametrize(("kind", "slots"), [("folded", 0), ("silenced", 1)])
def test_it_comes_out_plain(
    kind: str, slots: int, folder: Path, story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    original, tokenizer = story_model
    again = refit(
        folder, original, tokenizer, story_texts, replacement=parse_replacement(kind), output=tmp_path / "plain"
    )
    require_plain(again.result.model)
    spliced = load(folder)
    assert again.slots == slots and len(original.model.layers) == len(spliced.model.layers) + slots
    assert again.result.plan.removed == read_plans(folder)[0].removed
    assert again.spliced_parameters == spliced.num_parameters()
    plain, removed = (again.result.perplexities[name] for name in ("repaired", "removed"))
    assert again.spliced_perplexity < removed and plain < removed
    assert f"{kind}: perplexity {plain:.2f}, with splices {again.spliced_perplexity:.2f}" in str(again)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "plain")(ids).logits, original(ids).logits)


def test_other_text_another_original_and_another_plan_are_refused(
    folder: Path, story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    original, tokenizer = story_model
    with pytest.raises(StreamlineError, match=r"other text.*fingerprint"):
        refit(folder, original, tokenizer, story_texts[48:], replacement=FoldedConfig())
    with pytest.raises(StreamlineError, match=r"replacement=linear.*Expected"):
        refit(folder, original, tokenizer, story_texts, replacement=LinearConfig())
    other = copy.deepcopy(original)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(StreamlineError, match="not those of this original"):
        refit(folder, other, tokenizer, story_texts, replacement=FoldedConfig())
    by_hand = copy.deepcopy(original)
    with LayerSurgeon(by_hand) as surgeon:
        surgeon.replace(range(1, 3), LinearReplacement(original.config.hidden_size))
        surgeon.commit()
    save(by_hand, tmp_path / "by hand")
    with pytest.raises(StreamlineError, match=r"not say.*calibration_tokens"):
        refit(tmp_path / "by hand", original, tokenizer, story_texts, replacement=FoldedConfig())
    touching = copy.deepcopy(original)
    with LayerSurgeon(touching) as surgeon:
        for window in (range(1, 2), range(2, 4)):
            surgeon.replace(window, LinearReplacement(original.config.hidden_size))
        surgeon.commit()
    save(touching, tmp_path / "touching")
    with pytest.raises(StreamlineError, match="fitted again as one"):
        refit(tmp_path / "touching", original, tokenizer, story_texts, replacement=FoldedConfig())
    with LayerSurgeon(by_hand) as surgeon:
        surgeon.remove([0])
        surgeon.commit()
    save(by_hand, tmp_path / "twice")
    with pytest.raises(StreamlineError, match="2 surgeries"):
        refit(tmp_path / "twice", original, tokenizer, story_texts, replacement=FoldedConfig())


def test_on_the_command_line(
    folder: Path, stories: tuple[Any, Any], story_texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(copy.deepcopy(stories[0]), tmp_path / "original", tokenizer=stories[1])
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": story}) + "\n" for story in story_texts))
    options = ["--refit", "folded", "--original", str(tmp_path / "original"), "-c", str(text)]
    app(["export", str(folder), "-o", str(tmp_path / "plain"), *options], standalone_mode=False)
    assert "folded: perplexity" in capsys.readouterr().out
    require_plain(load(tmp_path / "plain"))
    for sources, reason in ((f"{text}:0.5,pydoc:0.5", "no mixture"), ("chat", "model wrote itself")):
        options[-1] = sources
        with pytest.raises(StreamlineError, match=reason):
            app(["export", str(folder), "-o", str(tmp_path / "other"), *options], standalone_mode=False)
