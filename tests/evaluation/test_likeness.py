"""Embeddings compared: against SciPy, and where it must not matter how they are turned."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.evaluation import compare_embeddings, embedding_similarity, embeddings, recall_at
from streamline_hooks.modeling import Task
from streamline_hooks.testing import tiny_model
from tests.other_models import OTHERS, made


def rows(count: int, features: int, seed: int) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


@given(st.integers(3, 12), st.integers(2, 6), st.integers(0, 99), st.booleans())
def test_spearman_is_scipys(count: int, features: int, seed: int, ties: bool) -> None:
    a, b = rows(count, features, seed), rows(count, features, seed + 100)
    if ties:
        a[1] = a[0]
        b[2] = b[0]
    found = compare_embeddings(a, b)
    x, y = (torch.nn.functional.normalize(one.double(), dim=-1) for one in (a, b))
    first, second = torch.triu_indices(count, count, offset=1)
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    wanted = stats.spearmanr((x @ x.T)[first, second].numpy(), (y @ y.T)[first, second].numpy()).statistic
    assert found.spearman == pytest.approx(wanted, abs=1e-6)
    assert found.cosine == pytest.approx(float((x * y).sum(-1).mean())) and found.count == count


@settings(max_examples=20)
@given(st.integers(0, 99))
def test_a_rotation_moves_embeddings_and_keeps_their_similarities(seed: int) -> None:
    a = rows(9, 5, seed)
    turned = a @ torch.linalg.qr(rows(5, 5, seed + 1))[0]
    found = compare_embeddings(a, turned)
    assert found.spearman > 0.999 and found.cosine < 0.99


def test_few_things_have_no_rank_correlation() -> None:
    assert (
        compare_embeddings(rows(2, 4, 0), rows(2, 4, 1)).spearman
        != compare_embeddings(rows(2, 4, 0), rows(2, 4, 0)).spearman
    )
    same = torch.ones(4, 3)
    assert str(compare_embeddings(same, rows(4, 3, 0)).spearman) == "nan"
    with pytest.raises(StreamlineError, match=r"\(3.*4\).*\(3.*5\)"):
        compare_embeddings(rows(3, 4, 0), rows(3, 5, 0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_found_by_what_is_no_number(value: float) -> None:
    good = torch.eye(5)
    broken = good.clone()
    broken[2, 1] = value
    with pytest.raises(StreamlineError, match=r"1 of.*5 queries.*NaN.*2\)"):
        recall_at(broken, good)
    with pytest.raises(StreamlineError, match=r"1 of.*5 documents"):
        recall_at(good, broken)


def test_recall() -> None:
    documents = torch.eye(5)
    assert recall_at(documents, documents) == 1.0
    queries = documents.clone()
    queries[0, 1] = 2.0  # finds the second first, and its own after it
    assert recall_at(queries, documents) == 0.8 and recall_at(queries, documents, 2) == 1.0
    assert recall_at(torch.ones(5, 5), documents) == 0.0, "all are as similar: nothing was found"
    assert recall_at(queries * torch.tensor([[1.0], [9.0], [0.1], [2.0], [3.0]]), documents) == 0.8
    for others, k in ((documents[:4], 1), (documents, 0), (documents, 6)):
        with pytest.raises(StreamlineError, match=rf"k={k}.*Expected"):
            recall_at(queries, others, k)


def test_a_changed_encoder_is_less_alike() -> None:
    model, batch = made("bert"), OTHERS["bert"].batch
    original = copy.deepcopy(model)
    assert embedding_similarity(model, original, [batch]).cosine == pytest.approx(1.0)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])
        found = embedding_similarity(model, original, [batch])
        again = compare_embeddings(embeddings(original, [batch]), embeddings(model, [batch]))
    assert found.cosine == again.cosine < 0.99
    with pytest.raises(StreamlineError, match="are the same module"):
        embedding_similarity(model, model, [batch])


def test_padding_and_batches_make_no_difference() -> None:
    model, batch = made("bert"), OTHERS["bert"].batch
    whole = embeddings(model, [batch])
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    alone = [{n: rows[k : k + 1, :length] for n, rows in batch.items()} for k, length in enumerate(lengths)]
    torch.testing.assert_close(embeddings(model, alone), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(embeddings(model, [batch["input_ids"]]), whole, atol=1e-3), "the padding counts"


def test_what_cannot_be_embedded() -> None:
    model = tiny_model("llama").model
    with pytest.raises(StreamlineError, match="batches is empty"):
        embeddings(model, [])
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(StreamlineError, match=r"NaN.*batch 0"):
        embeddings(model, [torch.arange(8).view(2, 4)], task=Task("embedding", "last"))
