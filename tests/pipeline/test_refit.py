"""A window is fitted again only from the same original and the same text, and comes out plain."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import LayerSurgeon, LinearConfig, StreamlineError, compress, load, save
from streamline_hooks.checkpoint import check_no_splices, read_plans
from streamline_hooks.cli import parse_replacement, run
from streamline_hooks.core import read_json
from streamline_hooks.data import Documents, MixedSource, mixed_split, read_documents
from streamline_hooks.pipeline import refit, refit_kinds
from streamline_hooks.repair import FoldedConfig, SilencedConfig
from streamline_hooks.replacements import LinearReplacement
from tests.configured import configured
from tests.logs import logged

SPLIT = {"sequence_length": 64, "calibration_tokens": 4096, "validation_tokens": 512, "test_tokens": 1024}


@pytest.fixture(scope="module")
def text(story_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of the compression, in a file."""
    file = tmp_path_factory.mktemp("text") / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": story}) + "\n" for story in story_texts))
    return file


def compressed(stories: tuple[Any, Any], texts: Any, target: Path, **settings: Any) -> Path:
    model, tokenizer = copy.deepcopy(stories[0]), stories[1]
    settings = {"remove": 2, "protect": [0], "repair": "linear", **SPLIT, **settings}
    compress(model, texts, configured(**settings), tokenizer=tokenizer, output=target)
    return target


@pytest.fixture(scope="module")
def folder(stories: tuple[Any, Any], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model with a splice in the place of two blocks, that records its calibration text."""
    return compressed(stories, read_documents(text), tmp_path_factory.mktemp("refit") / "spliced")


@pytest.fixture(scope="module")
def unrecorded(stories: tuple[Any, Any], story_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of text that was given as strings."""
    return compressed(stories, story_texts, tmp_path_factory.mktemp("refit") / "spliced")


@pytest.mark.sample(1)
@pytest.mark.parametrize(("kind", "slots"), [("folded", 0), ("silenced", 1)])
def test_it_comes_out_plain(kind: str, slots: int, folder: Path, story_model: tuple[Any, Any], tmp_path: Path) -> None:
    original, _ = story_model
    with logged() as messages:
        again = refit(folder, original, replacement=parse_replacement(kind), output=tmp_path / "plain")
    assert again.same_text and not any("text differs" in message for message in messages)
    check_no_splices(again.result.model)
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


@pytest.mark.long
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_the_data_types_may_differ(
    saved: torch.dtype, folder: Path, stories: tuple[Any, Any], text: Path, tmp_path: Path
) -> None:
    """The blocks are compared, and the perplexity measured, in the less precise of the two."""
    original = copy.deepcopy(stories[0])
    if saved == torch.bfloat16:
        half = copy.deepcopy(stories[0]).to(saved), stories[1]
        folder = compressed(half, read_documents(text), tmp_path / "spliced")
    else:
        original = original.to(torch.bfloat16)
    assert load(folder).dtype == saved != original.dtype
    again = refit(folder, original)
    assert again.same_text and again.result.model.dtype == original.dtype


@pytest.mark.long
def test_the_same_text_is_known_by_its_tokens(
    unrecorded: Path, story_model: tuple[Any, Any], story_texts: list[str]
) -> None:
    """Given as strings, it is the same; other text is fitted on, with a warning."""
    original, _ = story_model
    given = copy.deepcopy(original)
    assert refit(unrecorded, given, story_texts).same_text
    with logged() as messages:
        other = refit(unrecorded, original, story_texts[48:])
    (warning,) = [message for message in messages if "text differs" in message]
    assert not other.same_text and "fingerprint" in warning and "a different text" in str(other)
    assert other.result.data["fingerprint"][:12] in warning


@pytest.mark.long
def test_text_that_cannot_be_read_again_is_asked_for(
    unrecorded: Path, stories: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(StreamlineError, match=r"No source.*recorded.*given in Python.*--calibration"):
        refit(unrecorded, copy.deepcopy(stories[0]))
    file = tmp_path / "gone.jsonl"
    file.write_text("".join(json.dumps({"text": story}) + "\n" for story in story_texts))
    folder = compressed(stories, read_documents(file), tmp_path / "small")
    file.unlink()
    with pytest.raises(StreamlineError, match=r"cannot be read again.*gone.jsonl.*no such file.*--calibration"):
        refit(folder, copy.deepcopy(stories[0]))
    made = compressed(stories, Documents(story_texts, ["self"]), tmp_path / "generated")
    with pytest.raises(StreamlineError, match=r"self, which the original model generated.*--calibration"):
        refit(made, copy.deepcopy(stories[0]))


@pytest.mark.long
def test_a_mixture_and_a_test_text_are_read_again(
    stories: tuple[Any, Any], story_texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By relative names too, in the order of the sources, which decides who has a text that both have."""
    monkeypatch.chdir(tmp_path)
    half = len(story_texts) // 2
    for name, part in (("b", story_texts[: half + 20]), ("a", story_texts[half - 20 :]), ("test", story_texts[:30])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in part))
    shares = {"b": 0.75, "a": 0.25}
    sources = {name: MixedSource(read_documents(f"{name}.jsonl"), share) for name, share in shares.items()}
    split = mixed_split(sources, stories[1], test_documents=read_documents("test.jsonl"), **SPLIT)
    folder = compressed(stories, split, tmp_path / "small")
    entry = read_json(folder / "config.json")["streamline_hooks"]["history"][0]["calibration"]["source"]
    assert [(one["name"], one["share"], one["sources"]) for one in entry["mixture"]] == [
        ("b", 0.75, ["./b.jsonl"]), ("a", 0.25, ["./a.jsonl"]),
    ]  # fmt: skip
    assert entry["test"] == ["./test.jsonl"]
    assert "text of 75.0% ./b.jsonl, 25.0% ./a.jsonl" in (folder / "README.md").read_text()
    assert refit(folder, copy.deepcopy(stories[0])).same_text
    Path("test.jsonl").unlink()
    with pytest.raises(StreamlineError, match=r"cannot be read again.*test.jsonl"):
        refit(folder, copy.deepcopy(stories[0]))


@pytest.mark.long
def test_only_kinds_that_can_work_are_offered(
    folder: Path, stories: tuple[Any, Any], text: Path, tmp_path: Path
) -> None:
    original, tokenizer = stories
    before = copy.deepcopy(original.state_dict())
    assert refit_kinds(folder, original) == {"folded": "", "silenced": ""}
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    first = compressed(stories, read_documents(text), tmp_path / "first", protect=[2, 3, 4])
    assert read_plans(first)[0].removed == (0, 1)
    reasons = refit_kinds(first, original)
    assert "no block precedes" in reasons["folded"] and not reasons["silenced"]
    model = copy.deepcopy(original)
    with pytest.raises(StreamlineError, match=r"replacement=folded cannot.*no block precedes.*Expected silenced\."):
        refit(first, model, replacement=FoldedConfig())
    assert refit(first, model).result.kind == "silenced", "the only one that works"
    single = compressed(stories, read_documents(text), tmp_path / "single", remove=1)
    assert "keeps a block of each window" in refit_kinds(single, original)["silenced"]
    with pytest.raises(StreamlineError, match=r"replacement=silenced cannot be used.*Expected folded\."):
        refit(single, copy.deepcopy(original), replacement=SilencedConfig())
    neither = compressed(stories, read_documents(text), tmp_path / "neither", remove=1, protect=[1, 2, 3, 4])
    with pytest.raises(StreamlineError, match=r"No kind.*folded: .*silenced: .*Compress the original again"):
        refit(neither, copy.deepcopy(original))
    del tokenizer


def test_another_original_and_another_plan_are_refused(
    folder: Path, story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    original, tokenizer = story_model
    with pytest.raises(StreamlineError, match=r"replacement=linear.*plain model.*Expected folded or silenced"):
        refit(folder, original, story_texts, replacement=LinearConfig(), tokenizer=tokenizer)
    other = copy.deepcopy(original)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(StreamlineError, match="not made from this original"):
        refit(folder, other, story_texts, replacement=FoldedConfig(), tokenizer=tokenizer)
    by_hand = copy.deepcopy(original)
    with LayerSurgeon(by_hand) as surgeon:
        surgeon.replace(range(1, 3), LinearReplacement(original.config.hidden_size))
        surgeon.commit()
    save(by_hand, tmp_path / "by hand")
    with pytest.raises(StreamlineError, match=r"does not record.*calibration_tokens"):
        refit(tmp_path / "by hand", original, story_texts, replacement=FoldedConfig(), tokenizer=tokenizer)
    touching = copy.deepcopy(original)
    with LayerSurgeon(touching) as surgeon:
        for window in (range(1, 2), range(2, 4)):
            surgeon.replace(window, LinearReplacement(original.config.hidden_size))
        surgeon.commit()
    save(touching, tmp_path / "touching")
    with pytest.raises(StreamlineError, match="refitted as one"):
        refit(tmp_path / "touching", original, story_texts, replacement=FoldedConfig(), tokenizer=tokenizer)
    with LayerSurgeon(by_hand) as surgeon:
        surgeon.remove([0])
        surgeon.commit()
    save(by_hand, tmp_path / "twice")
    with pytest.raises(StreamlineError, match="2 surgeries"):
        refit(tmp_path / "twice", original, story_texts, replacement=FoldedConfig(), tokenizer=tokenizer)


@pytest.mark.long
def test_on_the_command_line(
    folder: Path, stories: tuple[Any, Any], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(copy.deepcopy(stories[0]), tmp_path / "original", tokenizer=stories[1])
    options = ["--refit", "folded", "--original", str(tmp_path / "original")]
    run(["export", str(folder), "-o", str(tmp_path / "plain"), *options])
    assert "folded: perplexity" in capsys.readouterr().out
    check_no_splices(load(tmp_path / "plain"))
    run(["export", str(folder), "-o", str(tmp_path / "half"), *options, "--dtype", "bfloat16"])
    assert "folded: perplexity" in capsys.readouterr().out and load(tmp_path / "half").dtype == torch.bfloat16
    run(["export", str(folder), "-o", str(tmp_path / "first"), "--refit", *options[2:]])
    assert "folded: perplexity" in capsys.readouterr().out
    first = compressed(stories, read_documents(text), tmp_path / "spliced", protect=[2, 3, 4])
    run(["export", str(first), "-o", str(tmp_path / "second"), *options[2:], "--refit"])
    assert "silenced: perplexity" in capsys.readouterr().out
    with pytest.raises(StreamlineError, match=r"replacement=folded cannot be used.*Expected silenced\."):
        run(["export", str(first), "-o", str(tmp_path / "third"), *options])
    for sources in (f"{text}:0.5,pydoc:0.5", "chat"):
        with pytest.raises(StreamlineError, match=r"without shares or generated.*Leave it out"):
            run(["export", str(folder), "-o", str(tmp_path / "other"), *options, "-c", sources])
