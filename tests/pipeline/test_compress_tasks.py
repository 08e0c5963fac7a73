"""The whole way for models that are no causal language models: batches in, a model that is saved and loaded out."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamline_hooks import LayerSurgeon, StreamlineError, Target, compress, find_stack, load
from streamline_hooks.cli import parse_loss
from streamline_hooks.core import prepare_inputs
from streamline_hooks.data import BatchSplit
from streamline_hooks.distillation import DistillationConfig, student_of, train
from streamline_hooks.evaluation import TaskScores, distances_of_candidates
from streamline_hooks.modeling import Candidate, Task
from streamline_hooks.pipeline.report import write_report
from streamline_hooks.replacements import LinearReplacement
from tests.configured import arguments, configured
from tests.other_models import OTHERS, TEXT, made, padded

CASES = {
    "vit": "kl", "dinov2": "embedding", "bert": "embedding + relative", "clip pictures": "embedding",
    "swin": "embedding", "t5 encoder": "kl", "t5 decoder": "kl + mse", "bart encoder": "kl + lm",
    "bart decoder": "kl", "whisper encoder": "kl",
}  # fmt: skip


def drawn(name: str, seed: int, count: int = 2) -> list[dict[str, Tensor]]:
    """Batches such as a case's own, with other values."""
    generator = torch.Generator().manual_seed(100 + seed)
    found = []
    for _ in range(count):
        batch = {}
        for key, value in OTHERS[name].batch.items():
            if value.is_floating_point():
                batch[key] = torch.randn(value.shape, generator=generator)
            elif key.endswith("input_ids"):
                new = torch.randint(3, 60, value.shape, generator=generator)
                batch[key] = new.where((value > 2) & (value < 60), value)
            else:
                batch[key] = value
        found.append(batch)
    return found


def parts(name: str) -> dict[str, list[Any]]:
    given = {part: drawn(name, k) for k, part in enumerate(("calibration", "validation", "test"))}
    if name == "vit":
        for k, batch in enumerate(given["test"]):
            batch["labels"] = torch.tensor([k, 3])
    if name.startswith("bart"):
        for batches in given.values():
            for batch in batches:
                mask = batch["decoder_attention_mask"].bool()
                batch["labels"] = batch["decoder_input_ids"].where(mask, -100)
    return given


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", CASES)
def test_the_whole_way(name: str, tmp_path: Path, log_messages: list[str]) -> None:
    model, case, given = made(name), OTHERS[name], parts(name)
    original, task, length = copy.deepcopy(model), Task.of(model), len(find_stack(model, case.path(model)))
    training = DistillationConfig(parse_loss(CASES[name]), learning_rate=1e-3, validations=2)
    options: dict[str, Any] = {"stack": case.path(model), "remove": len(case.removed), "distillation": training}
    result = compress(model, given, output=tmp_path / "out", **arguments(**options, protect=(0,)))
    assert any(
        line.startswith("data       calibration ") and f" {task.unit}s in 6 batches" in line for line in log_messages
    )
    assert len(find_stack(model, case.path(model))) == length - len(case.removed) and not result.perplexities
    measure = "kl" if task.gives_distributions else "cosine"
    scores = result.scores
    assert set(scores) >= {"original", "removed", "repaired", "trained"}
    assert result.training is not None and result.training.measure == task.distance
    assert result.training.distance <= result.training.distance_before
    assert all(measure in one for one in scores.values()) and ("accuracy" in scores["trained"]) == (name == "vit")

    kept = TaskScores(original, given["test"], task)
    for whose in (model, load(tmp_path / "out")):  # nothing was lost on the way to the folder
        again = kept.of(whose)
        assert again == {key: pytest.approx(value, abs=1e-5) for key, value in scores["trained"].items()}
    with LayerSurgeon(original, case.path(original)) as surgeon:
        surgeon.remove(result.candidates[0].windows[0])
        assert kept.of(original) == {k: pytest.approx(v, abs=1e-5) for k, v in scores["removed"].items()}
    assert all(one.distance > 0 for one in result.candidates)

    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["scores"] == scores and report["measure"] == task.distance and report["task"] == task.name
    assert result.table().count("repaired and trained") == len(scores["trained"])
    assert "plain removal | " in (tmp_path / "out/README.md").read_text()
    page = write_report(tmp_path, compression=report, command="c", title="t").read_text()
    assert "Scores by step" in page and task.distance in page


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["vit", "bert", "bart decoder", "t5 encoder", "dinov2", "llava pictures"])
def test_candidates_are_judged_by_what_the_model_says_without_them(name: str) -> None:
    model, case = made(name), OTHERS[name]
    batches, task, path = drawn(name, 7), Task.of(model), case.path(model)
    found = distances_of_candidates(model, batches, [Candidate(range(k, k + 1)) for k in (1, 2)], stack=path)
    for k, distance in zip((1, 2), found, strict=True):
        sums = []
        for batch in batches:
            with torch.no_grad():
                whole = task.answers(model(**prepare_inputs(model, batch)), batch).double()
                with LayerSurgeon(model, path) as surgeon:
                    surgeon.remove([k])
                    less = task.answers(model(**prepare_inputs(model, batch)), batch).double()
            if task.gives_distributions:
                p, q = whole.log_softmax(-1), less.log_softmax(-1)
                sums.append((p.exp() * (p - q)).sum(-1))
            else:
                sums.append(1 - torch.cosine_similarity(whole, less, dim=-1))
        assert distance == pytest.approx(float(torch.cat(sums).mean()), rel=1e-3, abs=1e-6)


QUICK = DistillationConfig({"relative": 1.0}, learning_rate=1e-2, validations=2)


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", ["bart encoder", "bart decoder", "t5 encoder", "t5 decoder"])
@pytest.mark.parametrize("objective", ["relative", "kl", "kl + mse"])
def test_padding_of_either_side_is_not_trained_on(name: str, objective: str) -> None:
    """A decoder's states are masked as the decoder is, though the batch has another mask for the encoder."""
    found = []
    for seed in (0, 1):
        model, case = made(name), OTHERS[name]
        batches = [padded([9, 5], 9, seed=k) | padded([6, 4], 6, "decoder_", seed=k + 9) for k in range(4)]
        for batch in batches:  # what padding holds must not matter
            for side in ("", "decoder_"):
                ids, mask = batch[f"{side}input_ids"], batch[f"{side}attention_mask"].bool()
                noise = torch.randint(3, 60, ids.shape, generator=torch.Generator().manual_seed(seed))
                batch[f"{side}input_ids"] = ids.where(mask, noise)
        stack = find_stack(model, case.path(model))
        student = student_of(stack, [(range(1, 3), LinearReplacement(32))])
        settings = replace(QUICK, loss=parse_loss(objective), epochs=3)
        trained = train(student, batches[:3], batches[3:], settings)
        assert trained.distance < trained.distance_before
        found.append(torch.cat([p.detach().flatten() for p in student.parameters().values()]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_an_objective_that_a_model_cannot_be_compared_by() -> None:
    for name, objective in (("bert", "kl"), ("vit", "embedding"), ("vit", "kl + lm"), ("bert", "embedding + lm")):
        model = made(name)
        training = replace(QUICK, loss=parse_loss(objective))
        with pytest.raises(StreamlineError, match=r"compares logits.*has none.*Use|lm.*Use|embedding.*Use"):
            compress(model, parts(name), configured(remove=1, distillation=training))
        assert len(find_stack(model)) == 4
    model = made("bart decoder")
    student = student_of(find_stack(model), [(range(1, 2), LinearReplacement(32))])
    with pytest.raises(StreamlineError, match=r"a batch has only .*Expected labels"):
        of_text = replace(QUICK, loss={"lm": 1.0})
        train(student, drawn("bart decoder", 0), drawn("bart decoder", 1), of_text)
    hidden = parts("bart decoder")
    hidden["calibration"][1]["decoder_attention_mask"] = torch.ones_like(hidden["calibration"][1]["labels"])
    hidden["calibration"][1]["decoder_attention_mask"][0, 0] = 0
    with pytest.raises(StreamlineError, match=r"1 labels.*decoder_attention_mask.*Extend"):
        train(student, hidden["calibration"], hidden["validation"], of_text)


def test_parts_that_are_none() -> None:
    model, given = made("vit"), parts("vit")
    with pytest.raises(StreamlineError, match=r"image-classification.*tokenizer.*Pass batches"):
        compress(model, ["a text"], configured(remove=1))
    with pytest.raises(StreamlineError, match=r"\(2\).*Expected"):
        compress(model, {"calibration": given["calibration"]}, configured(remove=1))
    with pytest.raises(StreamlineError, match=r"2 .*of the test.*calibration part"):
        compress(model, given | {"calibration": [*given["calibration"], given["test"][0]]}, configured(remove=1))
    with pytest.raises(StreamlineError, match="ViTForImageClassification"):
        compress(model, given, configured(remove=Target(latency=0.8)))
    one = [{"pixel_values": given["calibration"][0]["pixel_values"][:1]}]
    with pytest.raises(StreamlineError, match=r"one sequence or image.*at least two"):
        compress(model, given | {"calibration": one}, configured(remove=1))
    assert len(find_stack(model)) == 4


def test_the_same_text_under_other_padding_is_the_same() -> None:
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids)
    wide = {"input_ids": torch.tensor([[5, 6, 7, 1, 1]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    other = {"input_ids": ids + 1, "attention_mask": mask}
    narrow = {"input_ids": ids, "attention_mask": mask}
    with pytest.raises(StreamlineError, match=r"1 .*of the test.*validation part"):
        BatchSplit.of({"calibration": [other], "validation": [wide], "test": [narrow]}, Task("embedding"))


@pytest.mark.parametrize("sizes", [(2,), (1, 1), (3, 4, 3), (1, 1, 1, 1, 1, 1)])
def test_a_fifth_is_held_out_and_nothing_is_lost(sizes: tuple[int, ...]) -> None:
    rows = torch.arange(float(sum(sizes)))[:, None]
    batches: list[Any] = list(rows.split(list(sizes)))
    split = BatchSplit.of(
        {"calibration": batches, "validation": [rows + 100], "test": [rows + 200]}, Task("image-classification")
    )
    fit, held_out = split.fitting_and_held_out
    assert torch.equal(torch.cat([*fit, *held_out]), rows)
    assert sum(map(len, held_out)) == max(1, sum(sizes) // 5)


def test_a_causal_model_takes_batches_too(story_model: tuple[Any, Any], story_texts: list[str]) -> None:
    model, tokenizer = story_model
    ids = [tokenizer(text, return_tensors="pt").input_ids[:, :48] for text in story_texts[:18]]
    given = {"calibration": ids[:10], "validation": ids[10:14], "test": ids[14:]}
    result = compress(model, given, configured(remove=1, shortlist=2))
    assert result.perplexities["original"] < result.perplexities["repaired"] and not result.scores


@pytest.mark.parametrize("kind", ["linear", "swiglu:width=8"])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_model_of_another_library(library: str, kind: str, tmp_path: Path) -> None:
    """Images as bare tensors, a number of classes and no configuration."""

    def built() -> Any:
        torch.manual_seed(0)
        if library == "timm":
            vision = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
            model = vision.VisionTransformer(16, 8, embed_dim=32, depth=5, num_heads=2, num_classes=5)
        else:
            vision = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
            model = vision.VisionTransformer(16, 8, 5, 2, 32, 64, num_classes=5)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    def images(count: int, seed: int) -> list[Tensor]:
        return list(torch.randn(count, 4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))

    model, given = built(), {"calibration": images(6, 0), "validation": images(2, 1), "test": images(3, 2)}
    training = DistillationConfig({"kl": 1.0, "relative": 1.0}, learning_rate=1e-3, validations=2)
    options: dict[str, Any] = {"remove": 1, "repair": kind, "distillation": training, "output": tmp_path / "out"}
    result = compress(model, given, **arguments(**options))
    assert (
        result.task == Task("image-classification") and result.scores["trained"]["kl"] < result.scores["removed"]["kl"]
    )
    assert len(find_stack(model)) == 4 and "images in" in str(result.training)
    loaded = load(tmp_path / "out", into=built())
    with torch.no_grad():
        assert torch.equal(loaded(given["test"][0]), model(given["test"][0]))
    kept = TaskScores(built(), given["test"], result.task)
    assert kept.of(loaded) == {name: pytest.approx(value, abs=1e-6) for name, value in result.scores["trained"].items()}


@pytest.mark.long
def test_the_search_is_told_the_task() -> None:
    """The windows are ranked by the embedding that was asked for."""
    model, asked = made("bert"), []
    answers = Task.answers

    def watched(self: Task, output: Any, given: Any) -> Tensor:
        asked.append(str(self))
        return answers(self, output, given)

    for options in ({"criterion": "kl"}, {"search": "greedy", "criterion": "kl"}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Task, "answers", watched)
            compress(
                made("bert"), parts("bert"), **arguments(remove=1, task=Task("embedding", pooling="first"), **options)
            )
    assert set(asked) == {"embedding:pooling=first"}
    for criterion in ("perplexity", "taylor"):
        with pytest.raises(StreamlineError, match=rf"{criterion} needs next-token"):
            compress(model, parts("bert"), configured(remove=1, criterion=criterion))


def test_equal_content_is_found_whatever_is_beside_it() -> None:
    ids = torch.tensor([[5, 6, 7]])
    same: list[Any] = [
        ids,
        {"input_ids": ids.int()},
        {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)},
        {"input_ids": ids, "decoder_input_ids": torch.tensor([[1, 2, 0]])},
    ]
    for one in same:
        with pytest.raises(StreamlineError, match=r"1 .*of the test.*calibration part"):
            BatchSplit.of(
                {"calibration": [{"input_ids": ids}], "validation": [ids + 9], "test": [one]}, Task("embedding")
            )


def test_a_masked_model_is_judged_where_it_fills_in() -> None:
    import transformers

    from streamline_hooks.data import text_parts
    from tests.data.test_text_batches import tokenizer_of

    config = transformers.BertConfig(**TEXT)
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).eval()
    tokenizer = tokenizer_of(50, mask_token="[UNK]")
    documents = [" ".join(str((k * 7 + j) % 50) for j in range(12)) for k in range(60)]
    given = text_parts(
        documents, tokenizer, {"calibration": 120, "validation": 40, "test": 40}, sequence_length=14, masked=0.15
    )
    for batches in given.values():
        for batch in batches:
            places = batch["labels"] != -100
            assert bool(places.any(dim=1).all()) and bool((batch["input_ids"][places] == 3).all())
            assert not bool((places & ~batch["attention_mask"].bool()).any())
    result = compress(model, given, configured(remove=1), tokenizer=tokenizer)
    assert result.task == Task("masked-lm") and not result.perplexities
    assert result.data["test_tokens"] == sum(int((b["labels"] != -100).sum()) for b in given["test"])
    from streamline_hooks import perplexity

    with pytest.raises(StreamlineError, match=r"masked-lm.*next token"):
        perplexity(model, given["test"])
    with pytest.raises(StreamlineError, match=r"masked=0.1"):
        text_parts(documents, tokenizer_of(50), {"test": 40}, sequence_length=14, masked=0.1)


@pytest.mark.parametrize(
    ("name", "objective"), [("vit", "kl"), ("bert", "embedding"), ("bart decoder", "kl"), ("t5 encoder", "kl")]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_a_mean_over_answers(name: str, objective: str, accumulation: int) -> None:
    """On the same batches it is what is measured on the validation part, whatever else a batch has tokens of."""
    model, case = made(name), OTHERS[name]
    student = student_of(find_stack(model, case.path(model)), [(range(1, 2), LinearReplacement(32))])
    batches = drawn(name, 3)
    settings = replace(
        QUICK, loss=parse_loss(objective), learning_rate=1e-30, validations=1, gradient_accumulation_steps=accumulation
    )
    trained = train(student, batches, batches, settings)
    assert trained.history[-1]["loss"] == pytest.approx(trained.distance, rel=1e-3) and trained.distance > 1e-3
