"""The whole way, on trained weights."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamline_hooks import (
    CompressionConfig,
    RunOptions,
    StreamlineError,
    Target,
    compress,
    find_stack,
    load,
    perplexity,
    profile,
)
from streamline_hooks.core import split_into_batches
from streamline_hooks.data import PackedText, PackingConfig, document_starts, packed_text, read_documents
from streamline_hooks.distillation import DistillationConfig
from streamline_hooks.evaluation import SpeedReport, Timing
from streamline_hooks.pipeline.prepare import split_held_out
from streamline_hooks.repair import LinearConfig, fit_windows
from streamline_hooks.selection import verify_shortlist
from streamline_hooks.testing import tiny_model
from tests.configured import arguments, configured
from tests.processes import in_a_new_process
from tests.repair.own_kinds import register_kind
from tests.repair.replacement_modules import KINDS, SLOTS

PLAIN = ("block", "block:count=2", "silenced", "merged", "folded", "scale")
SIZES: dict[str, Any] = {
    "sequence_length": 64, "calibration_tokens": 6400, "validation_tokens": 640, "test_tokens": 640,
}  # fmt: skip
SMALL: dict[str, Any] = {**SIZES, "speed": False, "generation": False}


def test_the_whole_way(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path, log_messages: list[str]
) -> None:
    model, tokenizer = story_model
    original = copy.deepcopy(model)
    result = compress(
        model, story_texts, configured(remove=1, shortlist=3, **SIZES), tokenizer=tokenizer, output=tmp_path / "out"
    )
    assert result.model is model and len(find_stack(model)) == 4
    size = "4,096 parameters, 8,192 FLOPs per token, no slot"
    assert f"remove     1: 1 of 5 blocks (20.0%), replaced by linear ({size})" in log_messages
    p = result.perplexities
    assert p["original"] < p["repaired"] < p["removed"]
    distances = [one.distance for one in result.candidates]
    assert distances == sorted(distances) and len(distances) == 3
    for judged in result.candidates:
        assert judged.repairs[0].repaired_error < judged.repairs[0].removal_error
    assert result.plan.removed == tuple(result.candidates[0].windows[0])
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["perplexity"] == p and report["data"]["fingerprint"] == result.data["fingerprint"]
    loaded = load(tmp_path / "out")
    ids = tokenizer(story_texts[0], return_tensors="pt").input_ids[:, :64]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(original(ids).logits, model(ids).logits, atol=1e-2)
    assert loaded.config.streamline_hooks["history"][0]["calibration"]["fingerprint"] == result.data["fingerprint"]
    table = result.table()
    assert "5 -> 4, removed" in table and "peak memory" in table and str(tmp_path / "out") in table


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("none", "linear")])
def test_every_kind_ends_in_a_model(
    kind: str, story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    model, tokenizer = story_model
    size, keep = find_stack(model).parameters_per_block[0], (0,) if kind == "folded" else ()
    result = compress(
        model,
        story_texts,
        configured(remove=1, repair=kind, protect=keep, shortlist=3, **SMALL),
        tokenizer=tokenizer,
        output=tmp_path / "out",
    )
    slots = SLOTS.get(kind, 0)
    assert len(find_stack(model)) == 4 and len(result.plan.removed) == 1 + slots
    p, report = result.perplexities, json.loads((tmp_path / "out/report.json").read_text())
    assert p["original"] < p["repaired"] and (p["repaired"] < p["removed"] or kind in ("scale", "merged"))
    assert report["kind"] == result.kind == kind
    assert report["stand_in"] == asdict(result.size) and result.size.slots == slots
    gone, added = result.parameters[0] - result.parameters[1], result.size.parameters
    assert gone == size * (1 + slots) - added
    assert f"{kind} ({added:,} parameters" in result.table()
    loaded = load(tmp_path / "out")
    assert type(loaded).__name__ == ("LlamaForCausalLM" if kind in PLAIN else "StreamlinedLlamaForCausalLM")
    ids = tokenizer(story_texts[0], return_tensors="pt").input_ids[:, :64]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    a, b = (loaded.generate(ids[:, :8], max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(a, b)


def test_inherited_blocks_leave_as_many_blocks_as_were_asked_for(
    story_model: tuple[Any, Any], story_texts: list[str]
) -> None:
    """Each of two windows takes a slot."""
    model, tokenizer = story_model
    result = compress(
        model, story_texts, configured(remove=2, repair="block", search="disjoint", **SMALL), tokenizer=tokenizer
    )
    assert result.candidates[0].windows == (range(0, 2), range(3, 5)) and len(find_stack(model)) == 3


def test_zeroed_branches_leave_all_blocks(story_model: tuple[Any, Any], story_texts: list[str]) -> None:
    model, tokenizer = story_model
    kept = list(find_stack(model).blocks)
    config = configured(remove=2, repair="none", search="mlp", **SMALL)
    result = compress(model, story_texts, config, tokenizer=tokenizer)
    assert len(result.candidates[0].zeroed) == 2 and list(find_stack(model).blocks) == kept


def test_a_kind_that_a_checkpoint_cannot_hold_is_refused_at_once(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    from torch import nn

    register_kind("test-unregistered", lambda features: nn.Linear(features, features), solved=False)
    with pytest.raises(StreamlineError, match="Linear cannot be written"):
        compress(
            story_model[0],
            story_texts,
            configured(repair="test-unregistered", **SMALL),
            tokenizer=story_model[1],
            output=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_plain_removal(story_model: tuple[Any, Any], story_texts: list[str]) -> None:
    model, tokenizer = story_model
    result = compress(
        model, story_texts, configured(remove=0.2, repair="none", shortlist=5, **SMALL), tokenizer=tokenizer
    )
    assert set(result.perplexities) <= {"original", "removed", "first_removed"}
    assert type(model).__name__ == "LlamaForCausalLM"
    assert result.parameters[1] < result.parameters[0] and result.size_in_bytes[1] < result.size_in_bytes[0]


def test_the_same_seed_gives_the_same_model(stories: tuple[Any, Any], story_texts: list[str]) -> None:
    results = []
    for texts in (story_texts, story_texts[::-1]):
        model = copy.deepcopy(stories[0])
        results.append(compress(model, texts, configured(remove=1, seed=3, **SMALL), tokenizer=stories[1]))
    assert results[0].data == results[1].data and results[0].plan == results[1].plan
    first, second = (r.model.state_dict() for r in results)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.long
def test_the_seed_reaches_what_a_network_starts_from(stories: tuple[Any, Any], story_texts: list[str]) -> None:
    """All seeds had the same random weights, and differed by the text alone."""
    models = [copy.deepcopy(stories[0]) for _ in range(3)]
    for model, seed in zip(models, (0, 1, 1), strict=True):
        compress(
            model, story_texts, configured(remove=1, repair="swiglu:width=8", seed=seed, **SMALL), tokenizer=stories[1]
        )
    random = [
        {name: p for name, p in model.named_parameters() if "gate_proj" in name and ".mlp." not in name}
        for model in models
    ]
    assert all(len(found) == 1 for found in random)
    (first,), (second,), (third,) = (found.values() for found in random)
    assert not torch.equal(first, second) and torch.equal(second, third)


@pytest.mark.sample(2)
@pytest.mark.parametrize("search", ["disjoint", "one-shot", "mixed", "greedy", "attention"])
def test_every_search_ends_in_a_model(
    search: str, story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    model, tokenizer = story_model
    result = compress(
        model, story_texts, configured(remove=2, search=search, **SMALL), tokenizer=tokenizer, output=tmp_path / "out"
    )
    chosen = result.candidates[0]
    assert result.plan.removed == tuple(sorted(chosen.blocks))
    p = result.perplexities
    assert p["original"] < p["repaired"] < p["removed"]
    ids = tokenizer(story_texts[0], return_tensors="pt").input_ids[:, :64]
    loaded = load(tmp_path / "out")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert all(what in result.table() for what in str(chosen).split(", "))


@pytest.mark.sample(1)
@pytest.mark.parametrize("target", [Target(parameters=0.1), Target(fraction=0.2)])
def test_other_targets(target: Target, story_model: tuple[Any, Any], story_texts: list[str]) -> None:
    model, tokenizer = story_model
    result = compress(model, story_texts, configured(remove=target, **SMALL), tokenizer=tokenizer)
    before, after = result.parameters
    assert after <= 0.9 * before if target.unit == "parameters" else len(result.plan.removed) == 1


@pytest.mark.parametrize("repair", ["none", "swiglu:width=8"])
def test_bytes_that_may_be_left(
    repair: str, story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    model, tokenizer = story_model
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    target = Target(memory_bytes=0.75 * before)
    config = configured(remove=target, repair=repair, **SMALL)
    result = compress(model, story_texts, config, tokenizer=tokenizer, output=tmp_path / "out")
    reached = result.target
    assert reached is not None and (reached.target, reached.original) == (target, before)
    left = sum(p.numel() * p.element_size() for p in model.parameters())
    assert reached.predicted == reached.measured == left == result.size_in_bytes[1] <= target.amount
    assert reached.relative_error == 0.0 and not any("prediction" in text for text in result.warnings)
    row = next(line for line in result.table().splitlines() if line.strip().startswith("target"))
    assert f"{left / 1e6:.3f} MB predicted, {left / 1e6:.3f} MB measured (+0.0%)" in row
    report = json.loads((tmp_path / "out" / "report.json").read_text())["target"]
    assert report == {
        "target": {"memory_bytes": target.amount}, "original": before, "predicted": left, "measured": left,
        "relative_error": 0.0, "reached": True,
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {before / 1e6:.3f} MB | {left / 1e6:.3f} MB | {left / 1e6:.3f} MB | +0.0% |" in card
    assert CompressionConfig.load(tmp_path / "out").target == target
    file = tmp_path / "out" / "model.safetensors"
    assert left < file.stat().st_size < left + 20_000  # what is on the disk, with its header


def by_blocks(slower: Callable[[nn.Module], float]) -> Callable[..., SpeedReport]:
    """A stopwatch by which a block takes 10 ms, the head 20 ms, and all of a model as often as `slower` says."""

    def measure(models: dict[str, Any], **options: Any) -> SpeedReport:
        timings = {}
        for name, subject in models.items():
            with contextlib.nullcontext(subject) if isinstance(subject, nn.Module) else subject() as model:
                seconds = (0.01 * len(find_stack(model)) + 0.02) * slower(model)
            timings[name] = Timing((seconds,), (seconds,), 1, "", "", None)
        return SpeedReport(timings, 1, 1, 1, 1, "")

    return measure


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("target", "removed", "values"),
    [
        (Target(latency=0.75), 2, (1.0, 0.05 / 0.07, 0.05 / 0.07)),
        (Target(decode_latency=0.9), 1, (1.0, 0.06 / 0.07, 0.06 / 0.07)),
        (Target(seconds_per_token=0.051), 2, (0.07, 0.05, 0.05)),
    ],
)
def test_times_that_are_predicted_and_measured(
    target: Target,
    removed: int,
    values: tuple[float, ...],
    story_model: tuple[Any, Any],
    story_texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = story_model
    config = configured(remove=target, repair="none", **SMALL)
    is_late = False
    stopwatch = by_blocks(lambda model: 1.1 if is_late and len(find_stack(model)) < 5 else 1.0)
    monkeypatch.setattr("streamline_hooks.selection.target_timing.measure_speed", stopwatch)
    assert len(find_stack(model)) == 5
    late = copy.deepcopy(model)
    result = compress(model, story_texts, config, tokenizer=tokenizer)
    reached = result.target
    assert reached is not None and len(result.plan.removed) == removed == len(result.candidates[0].windows[0])
    assert (reached.original, reached.predicted, reached.measured) == pytest.approx(values)
    assert not result.warnings and str(reached) in result.table() and reached.is_reached

    def choose(*args: Any, **options: Any) -> Any:  # the machine is slower for the shorter model from here on
        nonlocal is_late
        is_late = True
        return verify_shortlist(*args, **options)

    monkeypatch.setattr("streamline_hooks.pipeline.one_round.verify_shortlist", choose)
    result = compress(late, story_texts, config, tokenizer=tokenizer)
    assert result.target is not None and result.target.relative_error == pytest.approx(0.1)
    assert any("off by more than 5%" in text and "(+10.0%)" in text for text in result.warnings)


def test_a_profile_that_is_there_is_used(story_model: tuple[Any, Any], story_texts: list[str]) -> None:
    model, tokenizer = story_model
    other = profile(copy.deepcopy(model), [torch.arange(3, 67).view(2, 32)])
    result = compress(
        model, story_texts, configured(remove=1, **SMALL), tokenizer=tokenizer, options=RunOptions(profile=other)
    )
    assert result.profile is other
    model.model.layers[0].mlp.down_proj.weight.data += 1
    with pytest.raises(StreamlineError, match="profile is of another model"):
        compress(
            model, story_texts, configured(remove=1, **SMALL), tokenizer=tokenizer, options=RunOptions(profile=other)
        )


def test_what_cannot_be_carried_out_is_passed_over(
    story_model: tuple[Any, Any], story_texts: list[str], monkeypatch: pytest.MonkeyPatch, log_messages: list[str]
) -> None:
    from streamline_hooks import UnsupportedSurgery
    from streamline_hooks.pipeline import apply

    original, refused = apply.apply_selection, []

    def refuse_the_first(surgeon: Any, selection: Any) -> None:
        if not refused or selection.windows == refused[0]:
            refused.append(selection.windows)
            raise UnsupportedSurgery("not this one")
        original(surgeon, selection)

    monkeypatch.setattr(apply, "apply_selection", refuse_the_first)
    result = compress(story_model[0], story_texts, configured(remove=1, **SMALL), tokenizer=story_model[1])
    assert refused and result.plan.removed != tuple(refused[0][0]) and result.candidates[0].windows != refused[0]
    (marked,) = (line for line in log_messages if line.endswith("<- chosen"))
    assert marked.split()[0] == str(result.plan.removed[0]), "the mark stands at what is left out"


def test_a_surgeon_that_is_open_is_told_of_before_anything_is_run(
    story_model: tuple[Any, Any], story_texts: list[str], log_messages: list[str]
) -> None:
    from streamline_hooks import LayerSurgeon

    model, tokenizer = story_model
    message = r"open on model.layers"
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 2))
        with pytest.raises(StreamlineError, match=message):
            compress(model, story_texts, configured(remove=1, **SMALL), tokenizer=tokenizer)
    assert not log_messages and len(model.model.layers) == 5
    assert len(compress(model, story_texts, configured(remove=1, **SMALL), tokenizer=tokenizer).plan.removed) == 1


def test_protected_blocks_stay(story_model: tuple[Any, Any], story_texts: list[str]) -> None:
    result = compress(
        story_model[0], story_texts, configured(remove=2, protect=(0, 1, -1), **SMALL), tokenizer=story_model[1]
    )
    assert result.plan.removed == (2, 3)


def test_the_reported_perplexity_is_the_saved_models(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    """Scored on other text, with the folder read again and no help from compress."""
    model, tokenizer = story_model
    scored = story_texts[:24]
    result = compress(
        model,
        story_texts[24:],
        configured(remove=1, **SMALL),
        tokenizer=tokenizer,
        output=tmp_path / "out",
        options=RunOptions(test_texts=scored),
    )
    from streamline_hooks.data import split_documents

    split = split_documents(story_texts[24:], tokenizer, test_documents=scored, **SIZES)
    value = perplexity(load(tmp_path / "out"), split_into_batches(split.test, 3)).value
    assert value == pytest.approx(result.perplexities["repaired"], rel=1e-5)


def test_an_error_leaves_model_and_folder_as_they_were(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path
) -> None:
    model, tokenizer = story_model
    before = copy.deepcopy(model.state_dict())
    model.model.layers[3].mlp.down_proj.weight.data[0, 0] = math.inf
    with pytest.raises(StreamlineError, match=r"leaves block 3|enters block 4"):
        compress(model, story_texts, configured(remove=1, **SMALL), tokenizer=tokenizer, output=tmp_path / "out")
    assert list(model.state_dict()) == list(before) and type(model).__name__ == "LlamaForCausalLM"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"remove": 0}, r"remove=0.*remove=8"),
        ({"remove": 5}, r"5 of 5 blocks.*one block must stay"),
        ({"repair": "cubic"}, r"'cubic'.*Expected one of none, linear"),
        ({"repair": "linear:rank=65"}, r"features=64, rank=65"),
        ({"repair": "block", "search": "greedy"}, r"'greedy'.*'block'"),
        ({"repair": "block:count=4"}, r"4 blocks.*no block to remove.*of 5"),
        ({"protect": (9,)}, "protect: block 9 is out of range"),
        ({"protect": (1, 3), "remove": 3}, r"3 consecutive blocks.*5"),
        ({"stack": "nowhere"}, r"'nowhere'.*'model.layers' \(5 blocks\)"),
        ({"sequence_length": 4096, "calibration_tokens": 9000, "validation_tokens": 5000, "test_tokens": 5000},
         r"sequence_length=4096.*512 positions"),
        ({"calibration_tokens": 64}, r"1 sequence of 64 tokens.*at least two"),
        ({"texts": []}, "tokens"),
        ({"texts": ["too short"]}, "tokens"),
        ({"shortlist": 0}, "at least 1"),
        ({"criterion": "cosin"}, r"'cosin'.*unknown"),
        ({"search": "windw"}, r"'windw'.*unknown"),
        ({"search": "one-shot", "remove": Target(parameters=0.2)}, "parameters:0.2.*single windows"),
        ({"search": "mlp", "criterion": "kl"}, r"criterion='kl'.*Expected 'cosine'"),
    ],
)  # fmt: skip
def test_bad_input(story_model: tuple[Any, Any], story_texts: list[str], changes: dict[str, Any], text: str) -> None:
    model, tokenizer = story_model
    options = {"remove": 1, "texts": story_texts, **SMALL, **changes}
    with pytest.raises(StreamlineError, match=text):
        compress(model, options.pop("texts"), tokenizer=tokenizer, **arguments(**options))


def test_a_tokenizer_of_another_model(story_model: tuple[Any, Any], story_texts: list[str]) -> None:
    class Shifted:
        def __init__(self, inner: Any) -> None:
            self.inner, self.name_or_path = inner, "another"

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [i + 1000 for i in self.inner(text, **options)["input_ids"]]}

    with pytest.raises(StreamlineError, match=r"'another'.*this model"):
        compress(story_model[0], story_texts, configured(remove=1, **SMALL), tokenizer=Shifted(story_model[1]))


@pytest.mark.slow
@pytest.mark.long
def test_smollm2_loses_a_quarter_of_its_blocks(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    """A real model, a fraction of the demo's tokens, and a new process that reads the result."""
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    result = compress(
        model,
        read_documents("pydoc"),
        configured(
            remove=0.25,
            protect=(0, 1, -1),
            shortlist=2,
            sequence_length=128,
            calibration_tokens=6_144,
            validation_tokens=512,
            test_tokens=512,
            speed=False,
            generation=False,
        ),
        tokenizer=tokenizer,
        output=tmp_path / "out",
    )
    assert len(result.plan.removed) == 8 and len(find_stack(model)) == 22
    p = result.perplexities
    assert p["repaired"] < 4 * p["original"] and p["repaired"] < p["removed"]
    batch = tokenizer(
        ["The capital of France is", "In Python, a list"], return_tensors="pt", padding=True, padding_side="left"
    )
    torch.save((dict(batch), model(**batch).logits), tmp_path / "expected.pt")
    code = """
        import sys, torch, streamline_hooks
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/out")
        batch, logits = torch.load(sys.argv[1] + "/expected.pt")
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(model(**batch).logits[real], logits[real], rtol=1e-5, atol=1e-5)
        a, b = (model.generate(**batch, max_new_tokens=12, do_sample=False, use_cache=c) for c in (True, False))
        assert torch.equal(a, b)
        print("same")
    """
    run = in_a_new_process(code, tmp_path, check=False)
    assert run.stdout.strip().endswith("same"), run.stderr


def packed_stories(folder: Path, tokenizer: Any, texts: list[str]) -> dict[str, PackedText]:
    """Rows of stories, for the three parts."""
    file = folder / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sizes = {"calibration": 3200, "validation": 640, "test": 640}
    return packed_text(file, tokenizer, sizes, PackingConfig(64))


def pieces(part: PackedText) -> list[torch.Tensor]:
    """Each piece of a document alone, of shape (1, tokens)."""
    found = []
    for ids, starts in zip(part.input_ids.long(), document_starts(part.position_ids), strict=True):
        edges = [*starts.nonzero().flatten().tolist(), len(ids)]
        found += [ids[None, a:b] for a, b in pairwise(edges)]
    return found


def test_packed_text_is_its_documents_alone(
    story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path, log_messages: list[str]
) -> None:
    """What is fitted, judged, trained and measured on packed rows, against each piece in a row of its own."""
    model, tokenizer = story_model
    original = copy.deepcopy(model)
    texts = packed_stories(tmp_path, tokenizer, story_texts)
    alone = {name: pieces(part) for name, part in texts.items()}
    assert len(alone["test"]) > len(texts["test"].input_ids) + 2
    result = compress(
        model,
        texts,
        configured(remove=1, shortlist=2, distillation=DistillationConfig(loss={"kl": 1.0, "lm": 0.5}, validations=1)),
        tokenizer=tokenizer,
    )
    assert "packed rows of 64" in next(line for line in log_messages if line.startswith("text"))
    assert result.data["test_tokens"] == 640 and result.data["sequence_length"] == 64
    p = result.perplexities
    assert p["original"] == pytest.approx(perplexity(original, alone["test"]).value, rel=1e-5)
    assert p["trained"] == pytest.approx(perplexity(model, alone["test"]).value, rel=1e-5)
    both = [split_held_out(t) for t in (texts["calibration"].input_ids, texts["calibration"].position_ids)]
    parts = [PackedText(*pair, 0, 0) for pair in zip(*both, strict=True)]
    for judged in result.candidates:
        (repair,) = fit_windows(original, judged.windows, LinearConfig(), *(pieces(part) for part in parts))
        assert judged.repairs[0].repaired_error == pytest.approx(repair.repaired_error, rel=1e-5)
    assert result.training is not None and result.training.distance < result.training.distance_before
    first = [tokenizer.decode(piece[0, :8]) for piece in alone["test"]]
    for written, _ in result.samples:
        assert any(written.prompt.startswith(beginning) for beginning in first)


def packed_rows(**more: Any) -> list[dict[str, Any]]:
    """Return batches with two documents in each row."""
    positions = torch.arange(12).repeat(2)[None].expand(2, 24)
    ids = [torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(k)) for k in range(8)]
    return [{"input_ids": each, "position_ids": positions, **more} for each in ids]


def test_packed_batches_whose_documents_a_model_mixes_are_refused() -> None:
    """A mask switches off the separation of documents in Transformers, and OPT has none."""
    assert compress(tiny_model("llama"), packed_rows(), remove=2).report
    mask = torch.ones(2, 24, dtype=torch.long)
    padded = mask.index_fill(1, torch.tensor([22, 23]), 0)
    for model, batches in (
        (tiny_model("llama"), packed_rows(attention_mask=mask)),
        (tiny_model("llama"), packed_rows(attention_mask=padded)),
        (tiny_model("opt"), packed_rows()),
    ):
        with pytest.raises(StreamlineError, match="mixes the documents of a packed row.*leave out an attention_mask"):
            compress(model, batches, remove=2)


def test_packed_text_that_cannot_be_used(story_model: tuple[Any, Any], story_texts: list[str], tmp_path: Path) -> None:
    model, tokenizer = story_model
    texts = packed_stories(tmp_path, tokenizer, story_texts)
    with pytest.raises(StreamlineError, match=r"\['calibration', 'test'\].*Expected calibration, validation"):
        compress(
            model, {name: texts[name] for name in ("calibration", "test")}, configured(remove=1), tokenizer=tokenizer
        )
    empty = PackedText(torch.empty(0, 64, dtype=torch.int32), torch.empty(0, 64, dtype=torch.int32), 0, 0)
    with pytest.raises(StreamlineError, match="at least one row"):
        compress(model, texts | {"test": empty}, configured(remove=1), tokenizer=tokenizer)
    with pytest.raises(StreamlineError, match=r"already have a test part.*Leave test_texts"):
        compress(model, texts, configured(remove=1), tokenizer=tokenizer, options=RunOptions(test_texts=story_texts))
    other = tiny_model("bloom", vocab_size=len(tokenizer))
    with pytest.raises(StreamlineError, match="mixes the documents of a packed row"):
        compress(other, texts, configured(remove=1), tokenizer=tokenizer)


@pytest.mark.long
def test_repeated_passages_choose_the_blocks_and_change_no_other_text(
    story_model: tuple[Any, Any], story_texts: list[str]
) -> None:
    """Where only one block can go, the fitted and trained repair is the same to the bit; it is judged otherwise."""
    model, tokenizer = story_model
    settings = DistillationConfig(validations=1)
    options: dict[str, Any] = {"protect": (0, 1, 3, 4), "distillation": settings, **SMALL}
    plain, repeated = (
        compress(
            copy.deepcopy(model),
            story_texts,
            tokenizer=tokenizer,
            **arguments(remove=1, repeated_context=share, **options),
        )
        for share in (0.0, 0.5)
    )
    assert repeated.perplexities == plain.perplexities
    assert plain.training is not None and repeated.training is not None
    distances = [[row["distance"] for row in one.history] for one in (plain.training, repeated.training)]
    assert distances[0] == distances[1], "what validates was changed"
    for name, value in plain.model.state_dict().items():
        assert torch.equal(repeated.model.state_dict()[name], value), name
    assert repeated.data["notes"][-1].startswith("for the choice of blocks, the second half of ")
    assert (repeated.data["repeated"], repeated.data["fingerprint"]) == (0.5, plain.data["fingerprint"])
    (one,), (other,) = plain.candidates, repeated.candidates
    assert one.blocks_text == other.blocks_text and one.distance != other.distance
    assert plain.profile is not None and repeated.profile is not None
    assert not torch.equal(plain.profile.cosine, repeated.profile.cosine)
    few = compress(
        copy.deepcopy(model),
        story_texts,
        tokenizer=tokenizer,
        **arguments(remove=1, repeated_context=0.5, fitting_tokens=650, **options),
    )
    assert few.data["fitting_tokens"] == 640  # whole sequences
    assert "the second half of 5 of 10 calibration sequences" in few.data["notes"][-1]
    with pytest.raises(StreamlineError, match=r"repeated_context=0\.5"):
        rows = torch.arange(3, 99).view(6, 2, 8) % 60 + 3
        parts = {name: list(rows[2 * k : 2 * k + 2]) for k, name in enumerate(("calibration", "validation", "test"))}
        compress(model, parts, **arguments(repeated_context=0.5, **{"remove": 1, "speed": False, "generation": False}))


def test_a_training_in_vain_is_told_at_the_end(story_model: tuple[Any, Any], story_texts: list[str]) -> None:
    """One whose rate throws the repair off, so that the start is kept."""
    model, tokenizer = copy.deepcopy(story_model[0]), story_model[1]
    settings = DistillationConfig(learning_rate=10.0, warmup_ratio=0.0, validations=2)
    result = compress(
        model,
        story_texts,
        configured(remove=1, distillation=settings, **SMALL),
        tokenizer=tokenizer,
    )
    assert result.training is not None and result.training.best_step == 0
    assert result.warnings == [result.training.warning] and "did not improve the model" in result.table()
    assert result.perplexities["trained"] == pytest.approx(result.perplexities["repaired"], rel=1e-5)
