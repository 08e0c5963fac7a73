"""Images with texts go through the model's own processor, and no part shares an image."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamline_hooks import StreamlineError, perplexity
from streamline_hooks.core import count_tokens, prepare_inputs, select_rows
from streamline_hooks.data import (
    BatchSplit,
    ImageText,
    PartSizes,
    Picture,
    contains_image_texts,
    image_text_parts,
    read_image_texts,
    task_batches,
)
from streamline_hooks.evaluation import agreement
from streamline_hooks.modeling import Task, find_stack
from streamline_hooks.statistics import profile
from tests.image_text_models import (
    BOTH,
    IMAGE_TOKENS,
    TILES,
    idefics_processor,
    llava_processor,
    picture,
    template,
    text_of,
    write_rows,
)

COUNTS = {"calibration": 8, "validation": 3, "test": 4}


def encoded(number: int) -> bytes:
    content = io.BytesIO()
    picture(number).save(content, format="PNG")
    return content.getvalue()


def rows(count: int, prompt: str = "which color?") -> list[ImageText]:
    return [ImageText(Picture(str(k), encoded(k)), text_of(k), prompt) for k in range(count)]


@pytest.mark.parametrize("name", BOTH)
def test_a_row_is_what_the_template_and_the_processor_make_of_it(name: str) -> None:
    processor = BOTH[name][1]()
    parts = image_text_parts(rows(15), processor, COUNTS, batch_size=3)
    assert {part: sum(len(b["input_ids"]) for b in batches) for part, batches in parts.items()} == COUNTS
    texts = {f"<s> user: which color? assistant: {text_of(k)}": k for k in range(15)}
    found: list[int] = []
    for batch in [batch for batches in parts.values() for batch in batches]:
        for k in range(len(batch["input_ids"])):
            one = select_rows(batch, slice(k, k + 1))
            ids = one["input_ids"][0][one["attention_mask"][0].bool()]
            is_image = ids == IMAGE_TOKENS[name]
            words = [w for w in processor.tokenizer.convert_ids_to_tokens(ids[~is_image]) if "vision" not in w]
            found.append(number := texts[" ".join(words)])  # with one BOS, though template and tokenizer have one
            alone = processor.image_processor(images=[picture(number)], return_tensors="pt")
            assert torch.equal(alone["pixel_values"], one["pixel_values"])
            cells = int(alone["image_grid_thw"].prod()) // 4 if "image_grid_thw" in alone else 5
            assert int(is_image.sum()) == cells
    assert sorted(found) == list(range(15))


@pytest.mark.parametrize("name", BOTH)
def test_the_tokens_of_an_image_are_no_labels(name: str) -> None:
    """The perplexity is that of the words alone, each predicted from all that precedes it."""
    make, processor = BOTH[name]
    model, images = make(), torch.tensor([IMAGE_TOKENS[name], *([48, 49] if name == "qwen2-vl" else [])])
    batches = image_text_parts(rows(4), processor(), {"test": 4}, batch_size=2)["test"]
    nats, count = 0.0, 0
    for batch in batches:
        labels, mask = batch["labels"], batch["attention_mask"].bool()
        is_image = torch.isin(batch["input_ids"], images)
        assert bool((labels[is_image] == -100).all()) and bool((labels[~mask] == -100).all())
        assert torch.equal(labels[mask & ~is_image], batch["input_ids"][mask & ~is_image])
        with torch.no_grad():
            logits = model(**prepare_inputs(model, batch)).logits.double().log_softmax(-1)
        for k, n in (labels[:, 1:] != -100).nonzero().tolist():
            if mask[k, n]:
                nats -= float(logits[k, n, labels[k, n + 1]])
                count += 1
    found = perplexity(model, batches)
    assert found.tokens == count and found.nll == pytest.approx(nats, rel=1e-5)
    plain = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    assert perplexity(model, plain).tokens > count


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_is_put_around_an_image_is_no_text(side: str) -> None:
    """Tokens for the positions of its tiles are neither labels nor counted; the begin and the end of a text are."""
    processor = idefics_processor(side)
    given = [ImageText(row.picture, f"{row.text} </s>", row.prompt) for row in rows(4)]
    batches = image_text_parts(given, processor, {"test": 4}, batch_size=2, text_tokens=13)["test"]
    found = []
    for ids, labels in ((i, n) for batch in batches for i, n in zip(batch["input_ids"], batch["labels"], strict=True)):
        tokens = processor.tokenizer.convert_ids_to_tokens(ids)
        assert {"<image>", "<global-img>", "<fake_token_around_image>", *TILES[:2]} <= set(tokens)
        found.append(" ".join(processor.tokenizer.convert_ids_to_tokens(labels[labels != -100])))
    assert sorted(found) == sorted(f"<s> user: which color? assistant: {row.text}" for row in given)
    with pytest.raises(StreamlineError, match="1 have more than text_tokens=8"):
        image_text_parts(given[:1], processor, {"test": 1}, text_tokens=8)


@pytest.mark.parametrize("name", BOTH)
def test_the_end_of_a_text_beside_an_image_is_a_label(name: str) -> None:
    processor = BOTH[name][1]()
    image = "<image>" if name == "llava" else "<|vision_start|> <|image_pad|> <|vision_end|>"
    processor.chat_template = template(f"<s> {image} </s>")
    labels = image_text_parts(rows(1), processor, {"test": 1})["test"][0]["labels"][0]
    words = processor.tokenizer.convert_ids_to_tokens(labels[labels != -100])
    assert words[:5] == ["<s>", "user:", "<s>", "</s>", "which"]


@pytest.mark.parametrize("name", BOTH)
def test_the_side_of_the_padding_changes_nothing(name: str) -> None:
    make, processor = BOTH[name]
    model = make()
    sides: dict[str, Any] = {}
    for side in ("right", "left"):
        batches = image_text_parts(rows(8), processor(side), {"calibration": 8}, batch_size=4)["calibration"]
        padded = [bool((batch["attention_mask"][:, 0 if side == "left" else -1] == 0).any()) for batch in batches]
        assert any(padded)
        sides[side] = profile(model, batches), perplexity(model, batches), batches
    right, left = sides["right"], sides["left"]
    torch.testing.assert_close(right[0].cosine, left[0].cosine, rtol=1e-5, atol=1e-6)
    assert right[1].tokens == left[1].tokens and right[1].nll == pytest.approx(left[1].nll, rel=1e-5)
    assert sum(map(count_tokens, right[2])) == sum(map(count_tokens, left[2]))


@pytest.mark.parametrize("name", BOTH)
def test_a_cut_batch_has_the_images_of_its_rows(name: str) -> None:
    """Though one model's patches of all images lie one after the other."""
    make, processor = BOTH[name]
    model, task = make(), Task("causal-lm")
    whole = image_text_parts(rows(5), processor(), {"test": 5}, batch_size=5)["test"]
    single = [select_rows(whole[0], slice(k, k + 1)) for k in range(5)]
    with torch.no_grad():
        together = task.answers(model(**prepare_inputs(model, whole[0])), whole[0])
        alone = torch.cat([task.answers(model(**prepare_inputs(model, one)), one) for one in single])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    other = make()
    with torch.no_grad():
        find_stack(other)[0].self_attn.o_proj.weight.mul_(1.1)
    assert agreement(other, model, single).kl == pytest.approx(agreement(other, model, whole).kl, rel=1e-3)
    parts = {"calibration": whole, "validation": single[:1], "test": single[1:]}
    with pytest.raises(StreamlineError, match=r"4 sequences or images of the test part"):
        BatchSplit.of(parts, task)


@pytest.mark.parametrize("name", BOTH)
def test_the_same_words_about_other_images_are_other_rows(name: str) -> None:
    same = [ImageText(row.picture, "w1 w2") for row in rows(6)]
    parts = image_text_parts(same, BOTH[name][1](), {"calibration": 2, "validation": 2, "test": 2})
    assert BatchSplit.of(parts, Task("causal-lm")).counts["test"] > 0


def test_no_two_parts_share_an_image() -> None:
    """A copy in another format is the same image; a second question about it stays in its part."""
    given = rows(9)
    content = io.BytesIO()
    picture(0).save(content, format="BMP")
    given += [ImageText(Picture("copy", content.getvalue()), "w1", "w2")]
    for seed in range(6):
        parts = image_text_parts(given, llava_processor(), {"calibration": 5, "test": 4}, batch_size=1, seed=seed)
        pixels = {part: {b["pixel_values"].numpy().tobytes() for b in batches} for part, batches in parts.items()}
        assert not pixels["calibration"] & pixels["test"]
    more = image_text_parts(rows(15), llava_processor(), {"calibration": 8, "test": 4}, batch_size=1)
    few = image_text_parts(rows(15), llava_processor(), {"calibration": 2, "test": 4}, batch_size=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(more["test"], few["test"], strict=True))
    with pytest.raises(StreamlineError, match=r"10 rows.*Expected 11"):
        image_text_parts(given, llava_processor(), {"calibration": 6, "test": 5})
    with pytest.raises(StreamlineError, match=r"9 have more than text_tokens=3.*increase text_tokens"):
        image_text_parts(rows(9), llava_processor(), {"test": 1}, text_tokens=3)


def test_rows_are_read_from_files(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a", 3, prompt="which")
    read = read_image_texts(path)
    assert [(row.prompt, row.text) for row in read] == [("which", text_of(k)) for k in range(3)]
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [{"bytes": encoded(k), "path": None} for k in range(3)]
    pq.write_table(pa.table({"image": images, "caption": [text_of(0), None, text_of(2)]}), tmp_path / "x.parquet")
    again = read_image_texts(tmp_path / "x.parquet")
    assert [row.text for row in again] == [text_of(0), text_of(2)], "a row without a text is left out"
    assert again[1].picture.content == encoded(2)
    assert contains_image_texts([path, tmp_path / "x.parquet"]) and contains_image_texts(["pydoc", path])
    (tmp_path / "text.jsonl").write_text('{"text": "w1"}')
    (tmp_path / "gone.jsonl").write_text('{"image": "gone.png", "text": "w1"}')
    (tmp_path / "broken.jsonl").write_text('{"image": ')
    assert contains_image_texts(tmp_path / "gone.jsonl"), "by its columns, though the image was moved"
    for none in (tmp_path / "text.jsonl", tmp_path / "broken.jsonl", tmp_path / "nothing.jsonl", tmp_path / "a/0.png"):
        assert not contains_image_texts(none)
    assert not contains_image_texts(None)
    for name, reason in (
        ("text.jsonl", r"columns \['text'\].*`image` and `text`"), ("gone.jsonl", r"no image file 'gone.png'.*Correct"),
        ("nothing.jsonl", r"no such file.*Expected"), ("a/0.png", r"ends in '.png'.*Expected"),
    ):  # fmt: skip
        with pytest.raises(StreamlineError, match=reason):
            read_image_texts(tmp_path / name)


def test_what_a_processor_cannot_do_is_refused_with_a_reason() -> None:
    processor = llava_processor()
    for given, reason in ((None, "none was given"), (processor.tokenizer, "PreTrainedTokenizerFast|TokenizersBackend")):
        with pytest.raises(StreamlineError, match=rf"model's processor.*({reason}).*AutoProcessor"):
            image_text_parts(rows(3), given, {"test": 1})
    processor.image_token_id = None
    with pytest.raises(StreamlineError, match=r"no image_token_id.*Set processor\.image_token_id"):
        image_text_parts(rows(3), processor, {"test": 1})
    without = llava_processor()
    without.chat_template = template("")
    with pytest.raises(StreamlineError, match=r"inserts no image token|cannot process"):
        image_text_parts(rows(3), without, {"test": 1})
    plain = llava_processor()
    plain.chat_template = None
    batch = image_text_parts(rows(3), plain, {"test": 1})["test"][0]
    words = plain.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert words[:6] == ["<s>", *["<image>"] * 5] and words[6:8] == ["which", "color?"]


def test_files_for_a_model_that_sees_and_reads(tmp_path: Path) -> None:
    make, processor = BOTH["llava"]
    path = write_rows(tmp_path, 15)
    amounts = PartSizes({}, COUNTS, 32, 4, 0)
    parts = task_batches(make(), processor(), Task("causal-lm"), [path], amounts)
    assert {part: sum(len(b["labels"]) for b in batches) for part, batches in parts.items()} == COUNTS
    with pytest.raises(StreamlineError, match=r"no source was given.*--calibration"):
        task_batches(make(), processor(), Task("causal-lm"), None, amounts)
    assert json.loads(path.read_text().splitlines()[0])["text"] == text_of(0)
