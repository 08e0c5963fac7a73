"""The benchmark of recipes on one scale: what a row is trained and scored on, and what the table averages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import losses, retained_quality, scored_tasks
from benchmarks.last_words import LastWord
from benchmarks.muon import MuonWithAdamW, muon_instead_of_adamw, orthogonalized
from benchmarks.retained_quality import COSINE, LEFT_OUT, PUBLISHED, RECIPES, paired_scores, table
from benchmarks.small_opt import Recipe, new_model, train_tokenizer
from benchmarks.training_text import TrainingText, training_text
from streamline_hooks import CompressionConfig
from streamline_hooks.distillation import LOSSES, student_of
from streamline_hooks.evaluation import Problem, task_config_from_rows
from streamline_hooks.modeling import find_stack

TEXT = "the cat sleeps under a green house near seven small apples while rain falls over the old garden"
ROWS = [{"query": "the cat sleeps", "choices": ["under", "rain"], "gold": gold} for gold in (0, 1)]
QUESTIONS = task_config_from_rows(ROWS, "copa")


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Let the benchmark use a small model; return the arguments with which text was read."""
    read: list[dict[str, Any]] = []
    tokenizer = train_tokenizer([f"{TEXT[k:]} {TEXT}" for k in range(60)], 300)

    def load(name: str, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        small = new_model(Recipe(width=64, blocks=5, heads=2, vocabulary=300, sequence=64)).eval()
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.2)
        return small, tokenizer

    def text(data: Path, tokenizer: Any, tokens: int, seed: int = 0, **options: Any) -> TrainingText:
        read.append({"seed": seed, **options})
        ids = torch.randint(3, 300, (24, 32), generator=torch.Generator().manual_seed(seed))
        return TrainingText(ids[:20], ids[20:], {}, torch.arange(20) % 2)

    def heldout(*_: Any) -> dict[str, Any]:
        batch = {"input_ids": torch.arange(3, 35).view(1, -1), "attention_mask": torch.ones(1, 32, dtype=torch.long)}
        return {domain: [batch] for domain in LEFT_OUT}

    for name, value in {"load_pretrained": load, "training_text": text, "heldout": heldout, "SEQUENCE": 32}.items():
        monkeypatch.setattr(retained_quality, name, value)
    for name, value in {"FILE": tmp_path / "rows.json", "ROOT": tmp_path}.items():
        monkeypatch.setattr(retained_quality, name, value)
    monkeypatch.setattr(retained_quality, "choose_window", lambda model, text, size: range(1, 1 + size))
    monkeypatch.setattr(retained_quality, "QUESTIONS", ("copa",))
    monkeypatch.setattr(scored_tasks, "problems_of", lambda *args: {"copying": [Problem("seven small", " apples")] * 2})
    monkeypatch.setattr(scored_tasks, "last_words", lambda *args: [LastWord("the cat ", "sleeps", "garden")] * 2)
    monkeypatch.setattr(scored_tasks, "task_of", lambda *args: QUESTIONS)
    return read


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """Run the benchmark; tasks that the small model cannot solve are not averaged."""
    monkeypatch.setattr(
        "sys.argv", ["retained_quality", "--data", ".", "--removed", "2", "--tokens", "640", *arguments]
    )
    monkeypatch.setattr(retained_quality, "table", lambda content: "table")
    retained_quality.main()
    rows: dict[str, Any] = json.loads(retained_quality.FILE.read_text())["rows"]
    return rows


def test_a_row_trains_without_a_domain_and_is_scored_once(
    texts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run(monkeypatch, "--recipes", "control,linear,block,closed form", "--seeds", "1")
    assert [row["removed"] for row in rows.values()] == [0, 2, 2, 2]
    assert {row["left_out"] for row in rows.values()} == {LEFT_OUT[1]} and not any("final" in r for r in rows.values())
    assert all(read in ({"seed": 1, "left_out": LEFT_OUT[1]}, {"seed": 0, "only": LEFT_OUT[1]}) for read in texts)
    control, linear, block, closed = rows.values()
    assert control["window"] == linear["window"] and len(range(*block["window"])) == 3
    assert closed["training"] is None and linear["training"]["steps"] == 20
    assert control["development"]["kl"]["seen"] < linear["development"]["kl"]["seen"]
    assert linear["development"]["kl"]["unseen"] > 0 and set(linear["development"]["right"]) == {"copying"}
    monkeypatch.setattr(retained_quality, "train", None)  # not called again
    assert run(monkeypatch, "--recipes", "control,linear", "--seeds", "1") == rows


def test_final_scores_are_added_to_rows_without_them(
    texts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(monkeypatch, "--recipes", "closed form", "--seeds", "0")
    rows = run(monkeypatch, "--recipes", "closed form", "--seeds", "0", "--final")
    ((key, row),) = rows.items()
    assert row["development"] == first[key]["development"]
    assert set(row["final"]["right"]) == {"copying", "last word", "copa"} and set(row["final"]["text"]) == set(LEFT_OUT)
    assert row["final"]["chance"]["copa"] == 0.5
    (counts,) = row["final"]["sampled"].values()
    assert len(counts) == 2 and row["final"]["chance_of_pass"].keys() == {"1", "8"}
    assert row["final"]["text"][LEFT_OUT[0]]["kl"] > 0
    assert not list(retained_quality.ROOT.rglob("*.training"))


def test_processes_share_the_rows_and_the_answers_of_the_original(
    texts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[nn.Module] = []
    score = scored_tasks.ScoredTasks.score

    def score_beside_another_process(tasks: Any, model: nn.Module) -> dict[str, str]:
        content = json.loads(retained_quality.FILE.read_text())
        content["originals"] |= {"development, float32": {"copying": "11"}, "development, bfloat16": {"copying": "11"}}
        content["rows"]["linear | 2 | 640 | 0"] = {"recipe": "linear"}
        retained_quality.FILE.write_text(json.dumps(content))
        scored.append(model)
        return score(tasks, model)

    monkeypatch.setattr(scored_tasks.ScoredTasks, "score", score_beside_another_process)
    rows = run(monkeypatch, "--recipes", "closed form,linear", "--seeds", "0")
    assert rows.keys() == {"closed form | 2 | 640 | 0", "linear | 2 | 640 | 0"} and len(scored) == 1
    assert rows["linear | 2 | 640 | 0"] == {"recipe": "linear"}, "made by the other process"
    assert retained_quality.FILE.with_suffix(".md").exists()


@pytest.mark.usefixtures("texts")
def test_rows_of_another_model_or_of_other_text_are_not_mixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, "--recipes", "none", "--seeds", "0")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "copa.jsonl").write_text("{}")
    with pytest.raises(SystemExit, match="another model or of other texts"):
        run(monkeypatch, "--recipes", "none", "--seeds", "1", "--data", str(tmp_path))


def _row(seed: int, right: Mapping[str, str], unknown: float) -> dict[str, Any]:
    kl = {domain: {"kl": unknown if domain == LEFT_OUT[seed] else 0.2, "perplexity_ratio": 1.1} for domain in LEFT_OUT}
    scores = {"right": right, "chance": {"copa": 0.5, "copying": 0.0}, "original": "o"}
    return {
        "seed": seed,
        "left_out": LEFT_OUT[seed],
        "minutes": 4.0,
        "training": None,
        "development": {"kl": {"seen": 0.3, "unseen": unknown}, **scores},
        "final": {
            "text": kl,
            **scores,
            "sampled": {"copying": [2] * 60},
            "chance_of_pass": {"1": {"copying": 0.05}, "8": {"copying": 0.3}},
            "original_sampled": "s",
        },
    }


def test_the_table_separates_known_and_unknown_text() -> None:
    original = {"copa": "1" * 90 + "0" * 10, "copying": "1" * 80 + "0" * 20, "last word": "1" * 50 + "0" * 50}
    half = {"copa": "1" * 70 + "0" * 30, "copying": "1" * 40 + "0" * 60, "last word": "1" * 25 + "0" * 75}
    rows = {"best | 8 | 1024 | 1": _row(1, half, 0.7), "best | 8 | 1024 | 0": _row(0, half, 0.9)}
    none = {task: "0" * 100 for task in ("copying", "last word")} | {"copa": half["copa"]}
    rows["block | 8 | 1024 | 1"] = _row(1, none, 0.8) | {"kept": 0.7333}
    originals = {"o": original, "s": {"copying": [4] * 60}}
    content = {"model": "small", "length": 30, "originals": originals, "rows": rows}
    lines = table(content).splitlines()
    (final, development) = (line for line in lines if line.startswith("| best |"))
    assert final.startswith("| best | 0, 1 |  | 0.200 | 0.800 |  | 1.10 | 1.10 | 50.0% [")
    assert "| 50%, 50% |" in final and "77.8%" in final
    assert f"| {(0.25 - 0.05) / (0.5 - 0.05):.1%} [" in final and "| 100.0% [" in final
    assert development.startswith("| best | 0, 1 | 0.300 | 0.800 | 0.900, 0.700 |  |")
    (other, other_development) = (line for line in lines if line.startswith("| block |"))
    assert other.startswith("| block | 1 | 73.3% | 0.200 | 0.800 | +0.100 |") and "| -50.0% [" in other
    assert other_development.startswith("| block | 1 | 0.300 | 0.800 | 0.800 | +0.100 |")
    rows["block | 8 | 1024 | 1"]["final"]["original"] = "p"  # questions in another precision
    originals["p"] = original | {"copa": "0" * 5 + "1" * 90 + "0" * 5}
    assert "| -50.0% [" in next(line for line in table(content).splitlines() if line.startswith("| block |"))
    rows["block | 8 | 1024 | 1"]["absolute_rates"] = True
    assert sum(line.startswith("| block * |") for line in table(content).splitlines()) == 2
    scores = {score.name: score for score in paired_scores(content, list(rows.values())[:2], "final")}
    assert scores["copying"].group == "generation" and scores["copa"].group == "classification"


def test_the_text_has_all_domains_but_one_or_only_one(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    for part in ("train", "heldout"):
        (tmp_path / "text" / part).mkdir(parents=True)
        for name in ("a", "b", "c"):
            sentences = " ".join(TEXT.split())
            documents = "\n\n\n".join(f"{name} {k} " + f"{sentences} " * 40 for k in range(60))
            if name in "ab":
                documents += "".join(f"\n\n\nshared {k} {sentences * 40}" for k in range(60))
            (tmp_path / "text" / part / f"{name}.txt").write_text(documents if part == "train" else "other")
    shares = training_text(tmp_path, tokenizer, 20 * 512, left_out="b").shares
    assert shares == {"a": 10 * 512, "c": 10 * 512}
    scored = training_text(tmp_path, tokenizer, 4 * 512, only="b")
    assert scored.shares == {"b": 4 * 512}
    assert "shared" not in " ".join(tokenizer.batch_decode(scored.train)), "another domain has this paragraph"
    with pytest.raises(SystemExit, match="no domain 'd' to leave out"):
        training_text(tmp_path, tokenizer, 512, left_out="d")
    with pytest.raises(SystemExit, match="no domain 'd'"):
        training_text(tmp_path, tokenizer, 512, only="d")


def test_recipes_differ_from_best_in_one_setting() -> None:
    best = RECIPES["best"]
    for name, recipe in RECIPES.items():
        if recipe.quantized:  # like the recipe with adapters
            assert replace(recipe, quantized=False) == RECIPES["all blocks healed by LoRA"]
            continue
        if name in (*PUBLISHED, "merged"):  # with the repair and training of another method
            continue
        if recipe.window == "cosine":
            assert replace(recipe, window="verified") == RECIPES[name.removesuffix(f" {COSINE}")]
            continue
        changed = [field for field in vars(best) if getattr(recipe, field) != getattr(best, field)]
        assert len(changed) == 1 or name in ("best", "closed form", "KL alone without healing"), name
        assert "," not in name, "recipes are separated by commas"


@pytest.mark.parametrize("name", [*PUBLISHED, "merged"])
def test_published_methods_are_fitted_and_trained(
    name: str, texts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = run(monkeypatch, "--recipes", name, "--seeds", "0").values()
    is_trained = CompressionConfig.preset(name).distillation is not None if name in PUBLISHED else False
    assert (row["training"] is not None) == is_trained
    assert len(range(*row["window"])) == 2 + RECIPES[name].repair.slots
    assert row["development"]["kl"]["seen"] > 0 and 0.5 < row["kept"] < 0.8


def test_the_window_of_highest_cosine_similarity_is_removed(
    texts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that changes the direction of no state is removed; recipes in the verified window keep theirs."""
    load = retained_quality.load_pretrained

    def with_idle_blocks(*args: Any) -> tuple[nn.Module, Any]:
        model, tokenizer = load(*args)
        for block in list(find_stack(model))[2:4]:
            for parameter in block.parameters():
                nn.init.zeros_(parameter)
        return model, tokenizer

    monkeypatch.setattr(retained_quality, "load_pretrained", with_idle_blocks)
    rows = run(monkeypatch, "--recipes", f"none {COSINE},replaceme {COSINE},none,merged {COSINE}", "--seeds", "0")
    windows = {row["recipe"]: row["window"] for row in rows.values()}
    assert windows["none"] == [1, 3]
    assert windows[f"none {COSINE}"] == windows[f"replaceme {COSINE}"] == [2, 4]
    assert len(range(*windows[f"merged {COSINE}"])) == 3
    assert rows[f"none {COSINE} | 2 | 640 | 0"]["development"]["kl"]["seen"] < 1e-4


def test_a_recipe_with_other_sequences_is_scored_on_the_same_ones(
    texts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences are joined within a domain, and the validation text is the same."""
    for name, length in (("sequences of 256", 16), ("sequences of 1024", 64)):
        monkeypatch.setitem(RECIPES, name, replace(RECIPES[name], sequence=length))
    trained, validated, original = [], [], retained_quality.train

    def spy(student: Any, train: list[Any], validation: list[Any], *args: Any, **options: Any) -> Any:
        trained.append(torch.cat([batch["input_ids"] for batch in train]))
        validated.append(torch.cat([batch["input_ids"] for batch in validation]))
        return original(student, train, validation, *args, **options)

    monkeypatch.setattr(retained_quality, "train", spy)
    rows = run(monkeypatch, "--recipes", "best,sequences of 256,sequences of 1024", "--seeds", "0")
    assert [row["training"]["steps"] for row in rows.values()] == [20, 40, 10]
    usual, short, long = trained
    assert torch.equal(short.view_as(usual), usual) and torch.equal(long[0].view(2, -1), usual[[0, 2]])
    assert sorted(long.flatten().tolist()) == sorted(usual.flatten().tolist())
    assert all(torch.equal(rows, validated[0]) for rows in validated)


@pytest.mark.usefixtures("texts")
def test_recipes_on_the_same_text_share_the_states_of_the_original(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cached, cache = [], retained_quality.cache_teacher_states
    monkeypatch.setattr(
        retained_quality,
        "cache_teacher_states",
        lambda *args, **options: cached.append(args[2]) or cache(*args, **options),
    )
    names = ("control", "linear", "half repeats passages", "all blocks healed")
    together = run(monkeypatch, "--recipes", ",".join(names), "--seeds", "0")
    assert cached == [1, 1, 0]  # the first changed block, or other text
    monkeypatch.setattr(retained_quality, "FILE", tmp_path / "alone.json")
    for name in names[1:]:
        run(monkeypatch, "--recipes", name, "--seeds", "0")
    alone = json.loads(retained_quality.FILE.read_text())["rows"]
    assert {key: row["development"] for key, row in alone.items()} == {
        key: row["development"] for key, row in together.items() if row["recipe"] != "control"
    }


@pytest.mark.usefixtures("texts")
def test_adapters_of_4_bit_weights_are_scored_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    scored, score = [], retained_quality.Bench.score_development

    def spy(bench: Any, model: Any, *args: Any) -> Any:
        scored.append(model)
        return score(bench, model, *args)

    monkeypatch.setattr(retained_quality.Bench, "score_development", spy)
    rows = run(
        monkeypatch, "--recipes", "all blocks healed by LoRA,all blocks healed by LoRA on 4-bit weights", "--seeds", "0"
    )
    whole, rounded = (row["development"]["kl"]["seen"] for row in rows.values())
    assert {parameter.dtype for parameter in scored[1].parameters()} == {torch.float32}
    assert scored[0] is not scored[1] and find_stack(scored[1]).path and rounded != whole
    assert rounded == pytest.approx(whole, rel=0.2)


@pytest.mark.usefixtures("texts")
def test_a_replacement_whose_output_is_still_zero_counts_as_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    untrained = replace(RECIPES["best"], distillation=None, healing=None)
    monkeypatch.setitem(RECIPES, "untrained", untrained)
    (row,) = run(monkeypatch, "--recipes", "untrained", "--seeds", "0").values()
    stack = find_stack(retained_quality.load_pretrained("smollm2", torch.float32)[0])
    added = untrained.repair.size(stack, range(*row["window"])).parameters
    assert row["kept"] == pytest.approx(3 / 5 + added / sum(stack.parameters_per_block))


@pytest.mark.usefixtures("texts")
def test_a_recipe_zeroes_branches_of_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    students = []

    def make(*args: Any, **options: Any) -> Any:
        students.append(student_of(*args, **options))
        return students[-1]

    monkeypatch.setattr(retained_quality, "student_of", make)
    monkeypatch.setitem(RECIPES, "branches", replace(RECIPES["best"], branches={"attention": 2, "mlp": 1}))
    rows = run(monkeypatch, "--recipes", "branches,control", "--seeds", "0")
    zeroed, control = rows.values()
    model = students[0].model
    assert model is not students[1].model and students[0].teacher is not model
    weights = {
        name: sum(not block.get_submodule(name).weight.any() for block in find_stack(model))
        for name in ("self_attn.out_proj", "fc2")
    }
    assert (
        weights == {"self_attn.out_proj": 2, "fc2": 1} and zeroed["removed"] == 0 and "branches | 0 | 640 | 0" in rows
    )
    assert control["kept"] == 1 > zeroed["kept"] > 0.5
    assert zeroed["development"]["kl"]["seen"] > control["development"]["kl"]["seen"]


@pytest.mark.usefixtures("texts")
def test_a_recipe_repeats_passages_in_the_training_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, validated = [], []

    def stop(student: Any, train: list[Any], validation: list[Any], *args: Any, **options: Any) -> Any:
        trained.extend(batch["input_ids"] for batch in train)
        validated.extend(batch["input_ids"] for batch in validation)
        raise SystemExit

    monkeypatch.setattr(retained_quality, "train", stop)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--recipes", "a quarter repeats passages", "--seeds", "0")
    repeats = [torch.equal(*row.chunk(2)) for rows in trained for row in rows]
    assert (len(repeats), sum(repeats)) == (20, 5)
    assert not any(torch.equal(*row.chunk(2)) for rows in validated for row in rows)


def test_the_kl_of_top_tokens_has_one_class_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "TOP", 2)
    teacher = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    student = torch.tensor([[0.3, 0.3, 0.1, 0.3]]).log().requires_grad_()
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.3, 0.3, 0.4])
    loss = losses.kl_of_top_tokens(student, teacher)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum()[None])
    loss.sum().backward()
    other = torch.tensor([[0.3, 0.3, 0.2, 0.2]]).log()  # the same, divided in another way among the rest
    torch.testing.assert_close(losses.kl_of_top_tokens(other, teacher), loss.detach())
    assert bool(student.grad.isfinite().all())  # type: ignore[union-attr]


def test_damaged_tokens_have_larger_weights() -> None:
    teacher = torch.zeros(2, 3)
    student = torch.tensor([[0.1, 0.0, 0.0], [2.0, 0.0, 0.0]])
    kl, weighted = (LOSSES[name].function(student, teacher) for name in ("kl", "damaged_tokens"))
    torch.testing.assert_close(weighted, kl * kl / kl.mean())
    assert losses.kl_of_damaged_tokens(teacher, teacher).tolist() == [0, 0]


def test_muon_orthogonalizes_matrices_and_leaves_vectors_to_adamw() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(6, 9)
    singular = torch.linalg.svdvals(orthogonalized(matrix))
    assert bool(((singular > 0.6) & (singular < 1.3)).all())
    vectors = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    weight = nn.Parameter(matrix.clone())
    for step in range(2):
        weight.grad = torch.randn(6, 9)
        for vector in vectors:
            vector.grad = torch.arange(4.0) + step
        with muon_instead_of_adamw():
            optimizers = [torch.optim.AdamW([vectors[0], weight], lr=0.1), torch.optim.AdamW([vectors[1]], lr=0.1)]
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(*vectors) and not torch.equal(vectors[0], torch.ones(4))
    assert set(optimizers[0].state[weight]) == {"momentum"}
    assert torch.optim.AdamW is not MuonWithAdamW
