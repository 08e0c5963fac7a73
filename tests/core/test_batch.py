"""A batch that is completed is what each of its texts alone is to the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from streamline_hooks.core.batch import count_tokens, padding_mask_of_call, prepare_inputs
from tests.other_models import PATCHED, bart, bert, mpnet, qwen2_vl, t5, xlm_roberta
from tests.tiny_models import left_padded, tiny_model

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def esm() -> nn.Module:
    settings = {"pad_token_id": 1, "mask_token_id": 2, "token_dropout": False, "position_embedding_type": "absolute"}
    return transformers.EsmModel(transformers.EsmConfig(**SMALL, max_position_embeddings=40, **settings))


def mra() -> nn.Module:
    return transformers.MraModel(transformers.MraConfig(**SMALL, max_position_embeddings=64))


def siglip_text() -> nn.Module:
    return transformers.SiglipTextModel(transformers.SiglipTextConfig(**SMALL, max_position_embeddings=16))


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tiny_model("gpt2"),
    "llama": lambda: tiny_model("llama"),
    "opt": lambda: tiny_model("opt"),
    "bert": bert,
    "xlm-roberta": xlm_roberta,
    "mpnet": mpnet,
    "esm": esm,
    "mra": mra,
    "siglip text": siglip_text,
    "qwen2-vl": qwen2_vl,
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


LEFT, RIGHT, HOLE = slice(0, 3), slice(5, 8), slice(3, 4)
PADDED = [(name, side) for name in MODELS for side in (LEFT, RIGHT)] + [
    (name, HOLE) for name in ("gpt2", "llama", "opt", "bert", "xlm-roberta", "esm")
]


@pytest.mark.parametrize(("name", "padding"), PADDED)
def test_each_text_is_to_the_model_what_it_is_alone(name: str, padding: slice) -> None:
    """RoBERTa and its kin count from behind the padding's number: nobody sees it where all that is compared is off."""
    model, pad = made(name), 1
    ids = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, padding], mask[1, padding] = pad, 0
    with torch.no_grad():
        together = model(**prepare_inputs(model, {"input_ids": ids, "attention_mask": mask}))[0]
        first, second = model(input_ids=ids[:1])[0], model(input_ids=ids[1:, mask[1].bool()])[0]
    torch.testing.assert_close(together[0], first[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1][mask[1].bool()], second[0], rtol=1e-4, atol=1e-4)


def test_what_stands_before_its_padding_is_left_as_the_model_counts_it() -> None:
    given = {"input_ids": torch.tensor([[5, 6, 7], [5, 1, 1]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    assert "position_ids" not in prepare_inputs(tiny_model("gpt2"), given)


def test_a_mask_may_number_the_texts_in_a_row() -> None:
    """As packed rows have it, 0 for padding: it was added up."""
    given = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [1, 1, 5, 6]]),
        "attention_mask": torch.tensor([[1, 1, 2, 2]] * 2),
    }
    given["attention_mask"][1, :2] = 0
    assert count_tokens(given) == 6
    assert prepare_inputs(tiny_model("gpt2"), given)["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]


def test_tokens_are_counted_wherever_they_stand_in_a_batch() -> None:
    ids, positions = torch.zeros(2, 5).long(), torch.arange(5)[None]
    for batch in ({"position_ids": positions, "input_ids": ids}, {"use_cache": False, "input_ids": ids}):
        assert count_tokens(batch) == 10
    assert count_tokens({"position_ids": positions, "inputs_embeds": torch.zeros(2, 5, 8)}) == 10
    assert count_tokens({"pixel_values": torch.zeros(2, 3, 8, 8)}) == 2


def test_places_in_an_image_are_the_models_own() -> None:
    model = made("qwen2-vl")
    assert not PATCHED["attention_mask"].bool().all()
    with torch.no_grad():
        assert torch.equal(model(**prepare_inputs(model, PATCHED))[0], model(**PATCHED, use_cache=False)[0])


class Around(nn.Module):
    """Hands on whatever it is given."""

    def __init__(self, inner: nn.Module, *others: nn.Module) -> None:
        super().__init__()
        self.inner, self.others = inner, nn.ModuleList(others)

    def forward(self, *args: Any, **batch: Any) -> Any:
        return self.inner(*args, **batch)


@pytest.mark.parametrize("around", [Around, lambda m: Around(Around(m)), lambda m: Around(m, nn.Linear(2, 2))])
def test_a_wrapper_is_given_what_the_model_inside_takes(around: Any) -> None:
    model = tiny_model("gpt2")
    expected, given = prepare_inputs(model, left_padded(3, 8)), prepare_inputs(around(model), left_padded(3, 8))
    assert given.keys() == expected.keys() and given["use_cache"] is False
    assert torch.equal(given["position_ids"], expected["position_ids"])
    assert list(prepare_inputs(around(model), torch.ones(1, 3, dtype=torch.long))) == ["input_ids", "use_cache"]


def test_the_mask_that_a_wrapper_hands_on_counts() -> None:
    mask = torch.tensor([[1, 1, 0]])
    assert padding_mask_of_call(Around(nn.Identity()), (), {"attention_mask": mask}, None) is mask


def test_a_decoder_of_pytorch_has_a_mask_of_its_own() -> None:
    layer = nn.TransformerDecoderLayer(4, 1, 8, batch_first=True)
    decoder, states, outer = nn.TransformerDecoder(layer, 1), torch.zeros(1, 3, 4), torch.tensor([[True, True, False]])
    padding = torch.tensor([[False, False, True]])

    def mask(**more: Tensor) -> Any:
        return padding_mask_of_call(decoder, (states, states), more, outer)

    assert mask(tgt_key_padding_mask=padding).tolist() == [[True, True, False]]
    assert mask() is None and mask(memory_key_padding_mask=padding) is None


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_ignored_label_inside_a_target_is_not_padding(family: str) -> None:
    """Padding of the decoder follows the last label of each row, whatever another row ignores."""
    model = {"t5": t5, "bart": bart}[family]().eval()
    inputs = torch.arange(5, 13).view(2, 4)
    labels = torch.tensor([[5, -100, 7, 8, 9], [6, 7, 8, -100, -100]])
    mask = prepare_inputs(model, {"input_ids": inputs, "labels": labels})["decoder_attention_mask"]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    without = {"input_ids": inputs, "labels": torch.full_like(labels, -100)}
    assert "decoder_attention_mask" not in prepare_inputs(model, without)
