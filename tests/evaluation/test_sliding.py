"""Sliding windows against a loop that runs the model once for every token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streamline_hooks import LayerSurgeon, StreamlineError, perplexity
from streamline_hooks.evaluation.perplexity import NotFiniteLikelihood
from streamline_hooks.evaluation.sliding_perplexity import TextPerplexity, sliding_perplexity
from streamline_hooks.testing import tiny_model as tiny
from tests.tiny_models import FAMILIES, VOCABULARY, repaired, tiny_model

module = import_module("streamline_hooks.evaluation.sliding_perplexity")  # the package has a function of this name


class Numbers:
    """A tokenizer of texts that are numbers with spaces between; it puts a BOS in front where it is let."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [int(word) for word in text.split()]}


def document(random: Random, length: int) -> str:
    return " ".join(str(random.randrange(3, VOCABULARY)) for _ in range(length))


def by_token(model: nn.Module, row: Sequence[int], window: int, stride: int) -> list[float]:
    """What each token but the first of a row costs, each from a forward of its own, by the definition in words."""
    found = []
    for place in range(1, len(row)):
        if place <= window:
            start = 0
        else:
            last = min(window + math.ceil((place - window) / stride) * stride, len(row) - 1)  # the window's last token
            start = last - window
        with torch.no_grad():
            logits = model(torch.tensor([row[start:place]]), use_cache=False).logits[0, -1].double()
        found.append(-float(logits.log_softmax(-1)[row[place]]))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6)
@given(
    st.lists(st.integers(0, 23), max_size=5),
    st.integers(1, 12).flatmap(lambda window: st.tuples(st.just(window), st.integers(1, window))),
    st.integers(1, 5),
    st.sampled_from(["bos", "eos", None]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_it_equals_a_forward_for_every_token(
    family: str,
    lengths: list[int],
    sizes: tuple[int, int],
    batch_size: int,
    first: Any,
    special: bool,
    random: Random,
) -> None:
    """Gemma's attention reaches back four tokens; in training mode as in evaluation."""
    model, (window, stride) = tiny_model(family, torch.float64), sizes
    texts = [document(random, length) for length in lengths]
    begin = {"bos": [1], "eos": [2], None: []}[first]
    rows = [begin + Numbers()(text, special)["input_ids"] for text in texts]
    costs = [cost for row in rows for cost in by_token(model, row, window, stride)]
    model.train()
    got = sliding_perplexity(
        model, Numbers(), texts, window=window, stride=stride, batch_size=batch_size, first=first,
        add_special_tokens=special,
    )  # fmt: skip
    assert model.training
    assert got.tokens == len(costs) == sum(max(0, len(row) - 1) for row in rows)
    assert got.nll == pytest.approx(math.fsum(costs), rel=1e-10, abs=1e-10)
    assert got.unpredicted == (0 if begin else sum(map(bool, rows)))


@given(st.integers(0, 300), st.integers(1, 40).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w))))
def test_no_token_is_left_out_or_scored_twice(predicted: int, sizes: tuple[int, int]) -> None:
    window, stride = sizes
    found = list(module.sliding_windows(0, predicted, window, stride))
    targets = [place for part in found for place in range(part.end - part.scored + 1, part.end + 1)]
    assert targets == list(range(1, predicted + 1))
    assert all(part.length == min(window, predicted) for part in found)  # as much context as there is room for
    assert all(part.scored <= (window if k == 0 else stride) for k, part in enumerate(found))


FAULTS = {
    "less context": lambda part: part._replace(start=min(part.start + 1, part.end - part.scored)),
    "a token left out": lambda part: part._replace(scored=max(1, part.scored - 1)),
    "a token scored twice": lambda part: part._replace(scored=min(part.length, part.scored + 1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_window_would_be_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text, real = tiny_model("llama", torch.float64), document(Random(0), 20), module.sliding_windows
    expected = math.fsum(by_token(model, [1, *map(int, text.split())], 8, 4))
    monkeypatch.setattr(module, "sliding_windows", lambda *given: map(FAULTS[fault], real(*given)))
    got = sliding_perplexity(model, Numbers(), [text], window=8, stride=4)
    assert got.nll != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("model", [repaired("llama", dtype=torch.float64), repaired("gpt2", dtype=torch.float64)])
def test_models_that_have_lost_blocks(model: nn.Module) -> None:
    text = document(Random(0), 20)
    row = [1, *map(int, text.split())]
    expected = math.fsum(by_token(model, row, 7, 3))
    assert sliding_perplexity(model, Numbers(), [text], window=7, stride=3).nll == pytest.approx(expected, rel=1e-10)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(range(1, 3))
        got = sliding_perplexity(model, Numbers(), [text], window=7, stride=3).nll
        assert got == pytest.approx(math.fsum(by_token(model, row, 7, 3)), rel=1e-10)
    assert got != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["mamba", "bloom", "mpt", "falcon", "jamba", "qwen3_next"])
def test_models_of_other_kinds(kind: str) -> None:
    """Recurrent states see the padding, which comes last; distances are counted in several ways."""
    try:
        model = tiny(kind, vocabulary=VOCABULARY + 3).eval()
    except StreamlineError as error:
        pytest.skip(str(error))
    random = Random(1)
    texts = [document(random, length) for length in (3, 17, 9)]
    expected = math.fsum(
        cost for text in texts for cost in by_token(model, [1, *map(int, text.split())], window=8, stride=4)
    )
    got = sliding_perplexity(model, Numbers(), texts, window=8, stride=4)
    assert got.nll == pytest.approx(expected, rel=1e-4)


def test_one_window_is_the_perplexity_of_the_row() -> None:
    model, text = tiny_model("llama"), document(Random(0), 30)
    row = torch.tensor([[1, *map(int, text.split())]])
    expected = perplexity(model, [row])
    got = sliding_perplexity(model, Numbers(), [text], window=30)
    assert (got.nll, got.tokens) == (pytest.approx(expected.nll, rel=1e-6), expected.tokens)
    assert got.value == pytest.approx(expected.value, rel=1e-6)


def test_the_head_is_run_where_something_is_scored() -> None:
    model, said = tiny_model("llama"), []
    model.lm_head.register_forward_pre_hook(lambda m, args: said.append(tuple(args[0].shape[:2])))
    random = Random(0)
    texts = [document(random, length) for length in (10, 18, 18, 6)]
    got = sliding_perplexity(model, Numbers(), texts, window=10, stride=4, batch_size=8)
    assert got.tokens == 52
    # The first windows, of which one is padded by four; then the second and third of the two long documents.
    assert said == [(4, 10), (4, 4)]
    assert sum(rows * places for rows, places in said) == got.tokens + 4
    said.clear()
    sliding_perplexity(model, Numbers(), texts[1:3], window=10, stride=10)
    assert said == [(2, 10), (2, 8)]


def test_bytes_are_those_of_the_text() -> None:
    class Letters(Numbers):
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [3 + ord(letter) % 50 for letter in text]}

    texts = ["Äpfel für\u3000alle", "日本語", "", " ends with space "]
    got = sliding_perplexity(tiny_model("llama"), Letters(), texts)
    assert got.tokens == sum(map(len, texts))
    assert got.bytes == 6 + 1 + 4 + 3 + 4 + 9 + 17  # an umlaut takes two bytes, the wide space and a kanji three
    assert got.bits_per_byte == pytest.approx(got.nll / math.log(2) / got.bytes, rel=1e-12)
    assert got.value == pytest.approx(math.exp(got.nll / got.tokens), rel=1e-12)
    whole = TextPerplexity()
    for text in texts:
        whole += sliding_perplexity(tiny_model("llama"), Letters(), [text])
    assert whole.nll == pytest.approx(got.nll, rel=1e-5)
    assert (whole.tokens, whole.bytes) == (got.tokens, got.bytes)


def test_what_is_said_of_it() -> None:
    found = TextPerplexity(math.log(2) * 30, 10, 15)
    assert str(found) == "perplexity 8 per token, 2.0000 bits per byte (10 tokens)"
    assert str(found + TextPerplexity(0.0, 0, 0, 1)) == "perplexity 8 per token (10 tokens)"
    assert str(TextPerplexity()) == "no token predicted"
    assert TextPerplexity(1e9, 1, 1).value == math.inf


def test_bytes_are_not_divided_by_where_a_token_went_unpredicted() -> None:
    got = sliding_perplexity(tiny_model("llama"), Numbers(), ["4 5 6", "", "7"], first=None)
    assert (got.tokens, got.unpredicted) == (2, 2)
    assert got.value > 1
    with pytest.raises(StreamlineError, match=r"2 first tokens.*bits per byte are undefined"):
        _ = got.bits_per_byte


def test_the_usual_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    real = module.sliding_windows
    monkeypatch.setattr(module, "sliding_windows", lambda d, n, w, s: seen.append((w, s)) or real(d, n, w, s))
    model = tiny_model("gpt2")
    sliding_perplexity(model, Numbers(), ["5 6"])
    sliding_perplexity(model, Numbers(), ["5 6"], window=9)
    sliding_perplexity(model, Numbers(), ["5 6"], window=1)
    sliding_perplexity(tiny("bloom", vocabulary=VOCABULARY + 3).eval(), Numbers(), ["5 6"])  # names no positions
    assert seen == [(128, 64), (9, 4), (1, 1), (1024, 512)]


def test_what_cannot_be_scored() -> None:
    model, texts = tiny_model("llama"), ["5 6 7"]

    class Bare(Numbers):
        bos_token_id = None

    with_eos = sliding_perplexity(model, Bare(), texts)
    assert with_eos == sliding_perplexity(model, Numbers(), texts, first="eos")
    assert with_eos != sliding_perplexity(model, Numbers(), texts)
    Bare.eos_token_id = None
    with pytest.raises(StreamlineError, match=r"bos_token_id.*eos_token_id.*first=None"):
        sliding_perplexity(model, Bare(), texts)
    with pytest.raises(StreamlineError, match="first='eos'.*no eos_token_id"):
        sliding_perplexity(model, Bare(), texts, first="eos")
    with pytest.raises(StreamlineError, match=r"first='BOS' is unknown.*'bos' or 'eos'"):
        sliding_perplexity(model, Numbers(), texts, first="BOS")  # type: ignore[arg-type]
    with pytest.raises(StreamlineError, match=r"window=129.*128 positions.*LlamaForCausalLM"):
        sliding_perplexity(model, Numbers(), texts, window=129)
    for wrong in ({"window": 0}, {"window": 4, "stride": 5}, {"stride": 0}, {"batch_size": 0}):
        with pytest.raises(StreamlineError, match="no more than the window|at least 1"):
            sliding_perplexity(model, Numbers(), texts, **wrong)
    with pytest.raises(StreamlineError, match="5 6 7.*list of strings"):
        sliding_perplexity(model, Numbers(), "5 6 7")
    with pytest.raises(StreamlineError, match="None"):
        sliding_perplexity(model, Numbers(), ["5", None])  # type: ignore[list-item]
    nothing = sliding_perplexity(model, Numbers(), [""])
    assert nothing == sliding_perplexity(model, Numbers(), []) == TextPerplexity()
    with pytest.raises(StreamlineError, match="No token"):
        _ = nothing.value
    with pytest.raises(StreamlineError, match=r"no byte.*Pass"):
        _ = nothing.bits_per_byte
    with pytest.raises(StreamlineError, match="LlamaModel is a model for embedding"):
        sliding_perplexity(model.model, Numbers(), texts)

    class Headless(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return model.model(**inputs)

    with pytest.raises(StreamlineError, match=r"without logits.*LM head"):
        sliding_perplexity(Headless(), Numbers(), texts)
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NotFiniteLikelihood, match=r"document 1.*nan"):
        sliding_perplexity(model, Numbers(), ["", "5 6"])
