"""One pass, every window: the states of the model, whatever the batches; which tokens count, and which blocks run."""

from __future__ import annotations

from random import Random
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from streamline_hooks import HiddenStateRecorder, LayerSurgeon, StreamlineError, profile
from streamline_hooks.core import prepare_inputs, progress_bar
from streamline_hooks.statistics import Profile, poisson_weights
from tests.statistics.reference import angles, cosines, entropy
from tests.tiny_models import BLOCKS, FAMILIES, Nudge, left_padded, padded, shuffled_batches, tiny_model, tokens

STATISTICS = ("cosine", "angular", "last_angular", "relative_magnitude", "entropy")


def states_by_sequence(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """Of each sequence the states of its real tokens, (places, tokens, features), in float64."""
    with torch.no_grad(), HiddenStateRecorder(model) as record:
        model(**prepare_inputs(model, batch))
    places = torch.stack([*(record.inputs[k][0] for k in range(BLOCKS)), record.outputs[BLOCKS - 1][0]])
    return [places[:, row, mask.bool()].double().numpy() for row, mask in enumerate(batch["attention_mask"])]


def assert_equal(got: Profile, expected: Profile, entropy_atol: float = 1e-9) -> None:
    assert (got.tokens, got.sequences, got.num_boundaries) == (
        expected.tokens,
        expected.sequences,
        expected.num_boundaries,
    )
    for statistic in STATISTICS:
        atol = entropy_atol if statistic == "entropy" else 1e-7
        torch.testing.assert_close(got.matrix(statistic), expected.matrix(statistic), rtol=1e-6, atol=atol)
        torch.testing.assert_close(got.replicates(statistic), expected.replicates(statistic), rtol=1e-6, atol=atol)
    torch.testing.assert_close(got.norms, expected.norms, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.largest_norms, expected.largest_norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_of_the_states_of_the_model(family: str) -> None:
    model, batch = tiny_model(family), left_padded(3, 9)
    got = profile(model, [batch])
    sequences = states_by_sequence(model, batch)
    every = np.concatenate(sequences, axis=1)
    np.testing.assert_allclose(got.cosine, cosines(every).mean(0), atol=1e-6)
    np.testing.assert_allclose(got.angular, angles(every).mean(0), atol=1e-6)
    last = np.stack([s[:, -1] for s in sequences], axis=1)
    np.testing.assert_allclose(got.last_angular, angles(last).mean(0), atol=1e-6)
    length = np.linalg.norm(every, axis=-1)
    np.testing.assert_allclose(got.norms, length.mean(1), rtol=1e-6)
    np.testing.assert_allclose(got.largest_norms, length.max(1), rtol=1e-6)
    np.testing.assert_allclose(got.median_norms, np.sort(length)[:, (length.shape[1] - 1) // 2], rtol=0.0222)
    relative = (np.linalg.norm(np.diff(every, axis=0), axis=-1) / length[:-1]).mean(1)
    np.testing.assert_allclose(got.relative_magnitude, relative, rtol=1e-5)
    assert got.value("relative_magnitude", range(1, 4)) == pytest.approx(relative[1:4].sum(), rel=1e-5)
    sizes = [s.shape[1] for s in sequences]
    disorder = np.average([[entropy(place) for place in s] for s in sequences], axis=0, weights=sizes)
    np.testing.assert_allclose(got.entropy, disorder, atol=0.02)  # a number on an edge may go to either bucket
    assert got.value("entropy", range(2, 5)) == pytest.approx(float(got.entropy[5] - got.entropy[2]))
    assert got.tokens == sum(sizes) and got.sequences == 3 and got.length == BLOCKS


@given(
    st.sampled_from(FAMILIES),
    st.lists(st.integers(2, 8), min_size=2, max_size=5, unique=True),
    st.integers(1, 5),
    st.sampled_from(["left", "right"]),
    st.integers(0, 1),
    st.randoms(),
)
def test_it_is_the_same_whatever_the_batches(
    family: str, lengths: list[int], size: int, side: str, skip: int, random: Random
) -> None:
    """Batch size, padding side, order and shards, resamples included, on a float64 model."""
    model, batch = tiny_model(family, torch.float64), padded(lengths, side)
    alone = [
        {"input_ids": i[m.bool()][None], "attention_mask": m[m.bool()][None]}
        for i, m in zip(*batch.values(), strict=True)
    ]
    expected = profile(model, alone, skip=skip)
    batches = shuffled_batches(batch, size, random)
    assert_equal(profile(model, batches, skip=skip), expected, entropy_atol=1e-3)
    shards = [
        profile(model, part, skip=skip) for part in (batches[: len(batches) // 2], batches[len(batches) // 2 :]) if part
    ]
    whole = shards.pop()
    for shard in shards:
        whole.merge(shard)
    assert_equal(whole, expected, entropy_atol=1e-3)


def test_the_bootstrap_is_numpys_with_the_same_weights() -> None:
    model, batch = tiny_model("llama", torch.float64), padded([3, 5, 8, 4, 7, 6], "left")
    got = profile(model, shuffled_batches(batch, 4, Random(1)), replicates=40)
    sequences = states_by_sequence(model, batch)
    contents = [i[m.bool()].numpy().astype("<i8").tobytes() for i, m in zip(*batch.values(), strict=True)]
    weights = poisson_weights(contents, 40).numpy()
    sizes = np.array([s.shape[1] for s in sequences])
    by_hand = {
        "cosine": (np.stack([cosines(s).sum(0) for s in sequences]), sizes),
        "angular": (np.stack([angles(s).sum(0) for s in sequences]), sizes),
        "last_angular": (np.stack([angles(s[:, -1:])[0] for s in sequences]), np.ones(6)),
    }
    for statistic, (sums, counts) in by_hand.items():
        drawn = np.stack([(w[:, None, None] * sums).sum(0) / (w * counts).sum() for w in weights.T if w.any()])
        np.testing.assert_allclose(got.replicates(statistic), drawn, atol=1e-7)
        low, high = got.interval(statistic, range(1, 4), 0.8)
        np.testing.assert_allclose((low, high), np.quantile(drawn[:, 1, 4], [0.1, 0.9]), atol=1e-7)
        assert low < got.value(statistic, range(1, 4)) < high
    one = list(got.resamples())
    assert len(one) == len(got.replicates("entropy"))
    for k in (0, 17):
        assert torch.equal(one[k].entropy.diff(), got.replicates("entropy")[k].diagonal(1))
        torch.testing.assert_close(one[k].cosine, got.replicates("cosine")[k], rtol=0, atol=0)
        assert torch.equal(one[k].largest_norms, got.largest_norms)


def test_which_tokens_count() -> None:
    model, batch = tiny_model("llama"), left_padded(3, 9)
    sequences = states_by_sequence(model, batch)

    def check(got: Profile, kept: list[np.ndarray]) -> None:
        np.testing.assert_allclose(got.cosine, cosines(np.concatenate(kept, axis=1)).mean(0), atol=1e-6)
        assert got.tokens == sum(k.shape[1] for k in kept)
        last = np.stack([s[:, -1] for s in sequences], axis=1)
        np.testing.assert_allclose(got.last_angular, angles(last).mean(0), atol=1e-6)
        assert got.sequences == 3

    check(profile(model, [batch], skip=2), [s[:, 2:] for s in sequences])
    check(profile(model, [batch], tokens="last"), [s[:, -1:] for s in sequences])
    mask = batch["input_ids"] % 2 == 0
    chosen = [mask[row, real.bool()].numpy() for row, real in enumerate(batch["attention_mask"])]
    assert mask[1, 0]  # padding that the mask would take
    check(profile(model, [batch], tokens=[mask]), [s[:, c] for s, c in zip(sequences, chosen, strict=True)])
    later = [c & (np.arange(len(c)) >= 3) for c in chosen]
    check(profile(model, [batch], tokens=[mask], skip=3), [s[:, c] for s, c in zip(sequences, later, strict=True)])


def test_skipping_more_than_there_is() -> None:
    with pytest.raises(StreamlineError, match="No token"):
        _ = profile(tiny_model("llama"), [tokens(2, 4)], skip=4).cosine


def calls(model: Any) -> list[str]:
    called: list[str] = []
    for k, block in enumerate(model.model.layers):  # what a block computes: one that is stopped is called too
        block.mlp.register_forward_pre_hook(lambda m, a, k=k: called.append(str(k)))
    model.model.norm.register_forward_hook(lambda *a: called.append("norm"))
    model.lm_head.register_forward_hook(lambda *a: called.append("head"))
    return called


def test_no_norm_no_head_and_no_block_that_must_stay_is_run() -> None:
    model = tiny_model("llama")
    whole, called = profile(model, [tokens(3, 9)]), calls(model)
    profile(model, [tokens(3, 9)])
    assert called == ["0", "1", "2", "3", "4", "5"]
    called.clear()
    kept = profile(model, [tokens(3, 9)], protect=[0, 2, -2, 5])
    assert called == ["0", "1", "2", "3"]
    assert kept.num_boundaries == 5 and kept.length == BLOCKS
    torch.testing.assert_close(kept.cosine, whole.cosine[:5, :5])
    torch.testing.assert_close(kept.replicates("entropy"), whole.replicates("entropy")[:, :5, :5])
    assert kept.value("cosine", range(1, 4)) == pytest.approx(whole.value("cosine", range(1, 4)))
    with pytest.raises(StreamlineError, match=r"blocks 2.*4 is.*blocks 0.*3.*without protect"):
        kept.value("cosine", range(2, 5))
    with pytest.raises(StreamlineError, match=r"blocks 0.*3"):
        kept.interval("angular", range(4, 5))


def test_at_a_splice_a_place_is_what_the_next_block_computes_on() -> None:
    """Also at the edge of what is run."""
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.insert(4, Nudge())
        whole, kept = profile(model, [tokens(2, 5)]), profile(model, [tokens(2, 5)], protect=[-1, -2])
    plain = profile(model, [tokens(2, 5)])
    torch.testing.assert_close(kept.cosine, whole.cosine[:5, :5])
    assert (kept.cosine - plain.cosine[:5, :5]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_where_massive_activations_are_born_and_die(family: str) -> None:
    """A bias that shoots one token up in block 2, and one that takes it back in block 4."""
    model = tiny_model(family)
    assert profile(model, [tokens(4, 12)]).massive_activation_blocks == []
    blocks = model.model.layers if family == "llama" else model.gpt_neox.layers

    def shoot(by: float) -> Any:
        def hook(block: nn.Module, args: Any, output: Any) -> Any:
            state = output[0] if isinstance(output, tuple) else output
            state = state.clone()
            state[1, 0, 3] += by
            return (state, *output[1:]) if isinstance(output, tuple) else state

        return hook

    blocks[2].register_forward_hook(shoot(1e6))
    blocks[4].register_forward_hook(shoot(-1e6))
    found = profile(model, [tokens(4, 12)])
    assert found.massive_activation_blocks == [2]
    assert found.largest_norms[3] == pytest.approx(1e6, rel=1e-2) and found.median_norms[3] < 1e3
    assert "creates massive activations" in str(found).splitlines()[4]
    assert profile(model, [tokens(4, 12)], skip=1).massive_activation_blocks == []


@pytest.mark.long
@pytest.mark.slow
def test_smollm2s_are_born_in_block_11(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    text = "The blocks of a transformer add to what they are given, and so a state is never far from the one before it."
    found = profile(
        model, [dict(tokenizer([text, text[40:]], return_tensors="pt", padding=True))], protect=range(-17, 0)
    )
    assert found.num_boundaries == 14 and found.massive_activation_blocks == [11]
    assert 100 < (found.largest_norms / found.median_norms)[12] < 300


def test_the_bar_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[Any, ...]] = []

    def bar(*given: Any) -> Any:
        said.append(given)
        return progress_bar(*given)

    monkeypatch.setattr("streamline_hooks.recording.recorder.progress_bar", bar)
    profile(tiny_model("llama"), [tokens(2, 5)], protect=[-1])
    assert said == [(10, "profile: 5 of 6 blocks, no head")]


class Tower(nn.Module):
    """A vision tower of two patches a picture, or of two crops with as many."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(4)))
        self.twice = False

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        states = pixels.view(len(pixels), 2, 8)
        return self.blocks(torch.cat([states, states]) if self.twice else states)


def test_sequences_are_told_apart_by_whatever_the_model_is_given() -> None:
    """Floats by token, positions and masks beside them, and pixels; in any order and batch size."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(6, 16, generator=generator)
    model = Tower()
    whole = profile(model, [{"pixels": pixels}])
    assert_equal(profile(model, [{"pixels": p} for p in pixels.flip(0).split(4)]), whole)
    assert not torch.equal(whole.replicates("cosine")[0], whole.replicates("cosine")[1])
    llama, embeds = tiny_model("llama", torch.float64), torch.randn(4, 5, 32, generator=generator, dtype=torch.float64)
    left = {"attention_mask": torch.ones(4, 7).long(), "inputs_embeds": nn.functional.pad(embeds, (0, 0, 2, 0))}
    left["attention_mask"][:, :2] = 0
    assert_equal(profile(llama, [left]), profile(llama, [{"inputs_embeds": e} for e in embeds.split(1)]), 1e-3)
    model.twice = True
    with pytest.raises(StreamlineError, match=r"\(6.*16\).*Expected.*12"):
        profile(model, [{"pixels": pixels}])
    assert profile(model, [{"pixels": pixels}], replicates=0).sequences == 12


def encoder(batch_first: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=batch_first).eval()


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_encoder(batch_first: bool) -> None:
    model, source = encoder(batch_first), torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
    batches = [s if batch_first else s.transpose(0, 1) for s in (source, source[:2], source[2:])]
    whole, *parts = ([{"src": batch}] for batch in batches)
    assert_equal(profile(model, [*parts[0], *parts[1]]), profile(model, whole), 1e-3)


def decoder(batch_first: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=batch_first)
    return nn.TransformerDecoder(layer, 3).eval()


def test_torchs_own_decoder_in_both_layouts() -> None:
    generator = torch.Generator().manual_seed(0)
    target, memory = torch.randn(4, 5, 8, generator=generator), torch.randn(4, 6, 8, generator=generator)
    batch, turned = (
        {"tgt": turn(target), "memory": turn(memory)} for turn in (lambda t: t, lambda t: t.transpose(0, 1))
    )
    assert_equal(profile(decoder(False), [turned]), profile(decoder(True), [batch]), 1e-3)


def test_a_nested_state_is_read_without_its_padding() -> None:
    model, source = encoder(True), torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    got = profile(model, [{"src": source, "src_key_padding_mask": padding}])
    assert_equal(got, profile(model, [{"src": s[~p][None]} for s, p in zip(source, padding, strict=True)]), 1e-3)


def test_a_sequence_of_padding_alone_is_left_out() -> None:
    model, batch = tiny_model("llama"), padded([5, 3, 4], "right")
    batch["attention_mask"][1] = 0
    two = {name: value[[0, 2]] for name, value in batch.items()}
    assert_equal(profile(model, [batch]), profile(model, [two]), 1e-3)


def test_what_cannot_be_profiled() -> None:
    model, batch = tiny_model("llama"), tokens(2, 5)
    for wrong, text in [
        ({"tokens": "first"}, r"tokens='first' is unknown.*Expected Literal"),
        ({"tokens": [batch > 3, batch > 3]}, r"2 masks.*1 batches.*Expected"),
        ({"tokens": [batch[:, :3] > 3]}, r"\(2, 3\).*\(2, 5\)"),
        ({"skip": -1}, r"skip=-1.*at least 0"),
        ({"protect": [0, 6]}, r"protect: block 6.*0 to 5.*6 blocks"),
        ({"protect": range(6)}, r"all 6 blocks.*Protect fewer"),
    ]:
        with pytest.raises(StreamlineError, match=text):
            profile(model, [batch], **wrong)
    with pytest.raises(StreamlineError, match=r"2 states.*Expected 3"):
        Profile(3).update([torch.zeros(1, 1, 2)] * 2, torch.ones(1, 1))
    with pytest.raises(StreamlineError, match="NaN, infinite"):
        Profile(2).update([torch.tensor([[[1.0, float("nan")]]])] * 2, torch.ones(1, 1))
    model.model.layers[3].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(StreamlineError, match=r"block 3.*NaN"):
        profile(model, [batch])


def test_what_cannot_be_read() -> None:
    model = tiny_model("llama")
    found = profile(model, [tokens(3, 5)])
    for window in (range(2, 2), range(-1, 3), range(0, 4, 2), cast("Any", 2)):
        with pytest.raises(StreamlineError, match=r"is not a window.*consecutive"):
            found.value("cosine", window)
    with pytest.raises(StreamlineError, match=r"blocks 3.*6 is.*6 blocks.*0 to 5"):
        found.value("cosine", range(3, 7))
    with pytest.raises(StreamlineError, match=r"'sine'.*Expected one of"):
        found.matrix("sine")  # type: ignore[arg-type]
    with pytest.raises(StreamlineError, match=r"level=95.*in \(0, 1\)"):
        found.interval("cosine", range(1, 2), 95)
    with pytest.raises(StreamlineError, match=r"0 replicates.*20"):
        profile(model, [tokens(3, 5)], replicates=0).interval("cosine", range(1, 2))
    with pytest.raises(StreamlineError, match=r"one counted token.*entropy"):
        _ = profile(model, [tokens(3, 5)], tokens="last").entropy
    with pytest.raises(StreamlineError, match="No token"):
        list(Profile(3, replicates=20).resamples())


@pytest.mark.parametrize("copies", [1, 5])
def test_one_text_again_and_again_makes_nobody_sure(copies: int) -> None:
    """All copies are drawn together, so that the replicates do not differ: an interval of no width would be a lie."""
    found = profile(tiny_model("llama"), [tokens(1, 5).repeat(copies, 1)])
    with pytest.raises(StreamlineError, match=rf"two different sequences.*has {copies}, all"):
        found.interval("cosine", range(1, 3))
    with pytest.raises(StreamlineError, match="two different sequences"):
        next(found.resamples())


def test_the_table() -> None:
    lines = str(profile(tiny_model("llama"), [tokens(3, 5)], protect=[-1])).splitlines()
    assert lines[0] == "LlamaForCausalLM, model.layers: 5 of 6 blocks, 15 tokens of 3 sequences"
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2", "3", "4"]
    assert str(profile(tiny_model("llama"), [tokens(3, 5)], tokens="last")).count("\n") == 7
    assert str(Profile(4)) == "a model, its stack: 3 of 3 blocks, 0 tokens of 0 sequences"


def test_padded_labels_of_an_encoder_decoder_are_no_tokens() -> None:
    """A batch for training has labels, and no ids or mask of the decoder."""
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0)
    )
    labels = tokens(4, 12)
    for row, end in enumerate((3, 12, 5, 7)):
        labels[row, end:] = -100
    batch = {"input_ids": tokens(4, 9), "labels": labels}
    mask = (labels != -100).long()
    found, expected = (
        profile(model, [given], stack="decoder.block") for given in (batch, batch | {"decoder_attention_mask": mask})
    )
    assert found.tokens == 27
    assert_equal(found, expected)
    assert profile(model, [batch | {"labels": labels.clamp(min=1)}], stack="decoder.block").tokens == 48
