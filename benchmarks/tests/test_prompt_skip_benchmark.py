"""The benchmarks of skipped prompts: a row for each variant, none measured twice, and no held-out text for choices."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optimum.quanto.library.extensions import cpp
from torch import nn

from benchmarks import depth_sweep, prompt_skip, prompt_skip_cost, scored_tasks
from benchmarks.last_words import LastWord
from benchmarks.small_opt import Recipe, new_model, train_tokenizer
from streamline_hooks.data import split_documents
from streamline_hooks.evaluation import GeneratedText, Problem, task_config_from_rows

TEXT = "the cat sleeps under a green house near seven small apples while rain falls over the old garden"
ENDS = [LastWord("the cat sleeps under a green ", "house", "garden")] * 2
QUESTIONS = task_config_from_rows([{"query": "the cat sleeps", "choices": ["under", "rain"], "gold": 0}] * 2, "copa")
PROBLEMS = {"copying": [Problem("seven small", " apples")] * 2}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> nn.Module:
    """Let the benchmark use a small model and little text."""
    texts = [f"{TEXT[k:]} {TEXT}" for k in range(60)]
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(0)
    small = new_model(Recipe(width=64, blocks=4, heads=2, vocabulary=300, sequence=1024)).eval()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    split = split_documents(
        texts, tokenizer, sequence_length=48, calibration_tokens=960, validation_tokens=96, test_tokens=96
    )
    monkeypatch.setattr(depth_sweep, "TIMED_IDS", (3, 300))
    monkeypatch.setattr(depth_sweep, "TIMED_TOKENS", 24)
    for module in (prompt_skip, depth_sweep):
        monkeypatch.setattr(module, "load_pretrained", lambda name: (small, tokenizer))
        monkeypatch.setattr(module, "split_of", lambda *args, **options: split)
        monkeypatch.setattr(module, "FILE", tmp_path / f"{module.__name__}.json")
    monkeypatch.setattr(depth_sweep, "PICTURE", tmp_path / "depth_sweep.svg")
    monkeypatch.setattr(scored_tasks, "problems_of", lambda *args: PROBLEMS)
    monkeypatch.setattr(scored_tasks, "last_words", lambda *args: ENDS)
    monkeypatch.setattr(prompt_skip, "QUESTIONS", ("copa",))
    monkeypatch.setattr(scored_tasks, "task_of", lambda *args: QUESTIONS)
    return small


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    words = ["prompt_skip", "--data", ".", "--windows", "2-3", "--items", "2", *arguments]
    monkeypatch.setattr("sys.argv", words)
    prompt_skip.main()
    rows: dict[str, Any] = json.loads(prompt_skip.FILE.read_text())["rows"]
    return rows


def test_each_variant_has_a_row_and_is_measured_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = run(monkeypatch, "--draw", "0")
    names = [row["name"].partition(" (")[0] for row in rows.values()]
    blocks = ["2 blocks" if key in prompt_skip.PRESETS else "2-3" for key in prompt_skip.VARIANTS]
    assert names[1:] == [f"{where}, {name}" for where, name in zip(blocks, prompt_skip.VARIANTS.values(), strict=True)]
    assert all(set(row["tasks"]) == {"copying", "last word", "copa"} for row in rows.values())
    trained, fitted, skipped, *removed = list(rows.values())[1:]
    assert [len(row["removed"]) for row in removed[-2:]] == [2, 3]  # LLM-Streamline adds a block
    assert trained["training"]["tokens"] > 0 and trained["kl"]["text"] <= fitted["kl"]["text"]
    assert "kl" in skipped and not any("kl" in row for row in removed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "generate" not in vars(model)
    assert "| generation | by draw | classification | by draw |" in prompt_skip.FILE.with_suffix(".md").read_text()
    assert "| 2-3, removed |" in prompt_skip.FILE.with_suffix(".md").read_text()
    more = run(monkeypatch, "--draw", "0", "--variants", "fitted", "--last-tokens", "1")
    assert list(more.values())[-1]["name"] == "2-3, skipped, with maps, last tokens in full: 1"
    monkeypatch.setattr(prompt_skip, "fit_prompt_skip", None)  # not called again
    assert run(monkeypatch, "--draw", "0") == more
    assert rows["0, 2 items, original"]["prompt_tokens"].keys() == {"copying", "last word"}


@pytest.mark.usefixtures("model")
def test_a_model_is_trained_once_for_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, compress = [], prompt_skip.compress
    monkeypatch.setattr(prompt_skip, "compress", lambda *args, **options: calls.append(1) or compress(*args, **options))
    rows = run(monkeypatch, "--draw", "0,1", "--variants", "streamline", "--seed", "3")
    names = ["original", "2 blocks, removed by LLM-Streamline (200,704 tokens, seed 3)"]
    assert [(row["draw"], row["name"]) for row in rows.values()] == [(draw, name) for draw in "01" for name in names]
    assert len(calls) == 1
    with pytest.raises(SystemExit):
        run(monkeypatch, "--draw", "0,9")


@pytest.mark.usefixtures("model")
def test_choices_are_made_without_heldout_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored_tasks, "last_words", None)
    rows = run(monkeypatch, "--draw", "development", "--variants", "fitted")
    assert [set(row["tasks"]) for row in rows.values()] == [{"copying"}, {"copying"}]
    more = run(monkeypatch, "--draw", "1", "--variants", "fitted", "--shots", "9")
    assert [set(row["tasks"]) for row in more.values()] == [{"copying"}] * 4
    assert "Draw 1, 2 items per task, 9 examples per problem" in prompt_skip.FILE.with_suffix(".md").read_text()


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("text", "right"), [(" house.", "1"), (" house", "1"), (" houses", "0"), (" green house", "0"), ("", "0")]
)
def test_the_last_word_may_be_followed_by_a_full_stop(text: str, right: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []

    def generate(model: Any, tokenizer: Any, contexts: list[str], *args: Any, **options: Any) -> Any:
        prompts.extend(contexts)
        return [(GeneratedText(context, text, (), ended=False),) for context in contexts]

    monkeypatch.setattr(scored_tasks, "generate_texts", generate)
    small, tokenizer = prompt_skip.load_pretrained("smollm2")
    tasks = scored_tasks.ScoredTasks(Path("."), tokenizer, 2, "0")
    assert tasks.score_last_words(small) == right * 2
    assert prompts == ["the cat sleeps under a green"] * 2  # the space belongs to the tokens of the word


def unpack_4_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    assert bits == 4
    return torch.cat([packed & 15, packed >> 4])


def test_the_sweep_combines_removal_skipping_and_quantization(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(depth_sweep, "NEW_TOKENS", 3)
    monkeypatch.setattr(depth_sweep.ScoredTasks, "score", lambda tasks, model: {"copying": "11"})
    words = ["--data", ".", "--removed", "0,1", "--skipped", "0,2", "--items", "2", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["depth_sweep", *words])
    monkeypatch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack_4_bits))  # instead of compiling it
    depth_sweep.main()
    rows = list(json.loads(depth_sweep.FILE.read_text())["rows"].values())
    assert [(row["removed"], row["skipped"], row["weights"]) for row in rows] == [
        (removed, skipped, weights)
        for removed in (0, 1)
        for skipped in (0, 2)
        for weights in ("float32", "int8", "int4")
    ]
    original, int8, int4 = rows[:3]
    assert abs(original["kl"]["text"]) < 1e-6 < int8["kl"]["text"] < int4["kl"]["text"]
    assert original["bytes"] > int8["bytes"] > int4["bytes"]
    skipped, removed = rows[3], rows[6]
    assert skipped["bytes"] >= original["bytes"] > removed["bytes"] and skipped["kl"]["repeated"] > 1e-6
    assert skipped["window"] and not original["window"] and removed["kl"]["text"] > 1e-6
    assert depth_sweep.PICTURE.read_text().count("blocks removed") == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_ideal_cost_of_a_prompt(model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prompt_skip_cost, "load_pretrained", lambda name: (model, None))
    monkeypatch.setattr(prompt_skip_cost, "IDS", (3, 300))
    monkeypatch.setattr(prompt_skip_cost, "FILE", tmp_path / "prompt_skip_cost.json")
    monkeypatch.setattr("sys.argv", ["prompt_skip_cost", "--tokens", "32,64", "--skipped", "1,2", "--rounds", "1"])
    prompt_skip_cost.main()
    rows = json.loads(prompt_skip_cost.FILE.read_text())["rows"]
    assert [(row["tokens"], row["skipped"]) for row in rows] == [(32, 1), (32, 2), (64, 1), (64, 2)]
    assert [row["ideal"] for row in rows] == pytest.approx([cost(32, 1), cost(32, 2), cost(64, 1), cost(64, 2)])


def cost(tokens: int, skipped: int, width: int = 64, vocabulary: int = 300, blocks: int = 4) -> float:
    """Return the ideal cost of an OPT block with 12 weight matrices of the model's width."""
    block, keys = 24 * tokens * width**2 + 4 * tokens**2 * width, 4 * tokens * width**2
    whole = blocks * block + 2 * width * vocabulary
    skipping = skipped * (keys + (block - keys) * 17 / tokens) + (skipped - 1) * 2 * tokens * width**2
    return (whole - skipped * block + skipping) / whole


def test_a_row_is_on_the_front_unless_another_is_better_in_one_and_worse_in_none() -> None:
    good = {"accuracy": 0.9, "bytes": 100, "prefill": 0.8, "decode": 0.8}
    rows = [good, good | {"accuracy": 0.8}, good | {"accuracy": 0.8, "bytes": 90}, dict(good)]
    assert [depth_sweep.is_on_front(row, rows) for row in rows] == [True, False, True, True]
