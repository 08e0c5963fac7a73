"""What tells two models, or two tokenizers, from one another; and what does not."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from streamline_hooks import LayerSurgeon
from streamline_hooks.core.hashing import batches_digest, model_digest, tokenizer_digest, tokens_digest
from streamline_hooks.replacements import LinearReplacement
from tests.evaluation.number_tasks import Numbers
from tests.tiny_models import SETTINGS, WIDTH, tiny_model


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (True, False),
        (1, 2),
        (1.0, 2.0),
        (1, 1.0),
        ("left", "right"),
        (np.zeros(2), np.ones(2)),
        (np.zeros(2), np.zeros(2, dtype=np.float32)),
        (np.float32(1), np.float32(2)),
        ([1, 2], [1, 3]),
        (torch.zeros(2), torch.zeros(1, 2)),
    ],
)
def test_batches_with_other_values_have_other_digests(one: Any, other: Any) -> None:
    ids = torch.arange(4).view(2, 2)
    first, again, second = (batches_digest([{"input_ids": ids, "x": copy.copy(x)}]) for x in (one, one, other))
    assert first == again != second


class Scale(nn.Module):
    """Has no weight, and counts nothing but in private."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by, self._runs = by, 0

    def forward(self, state: Tensor) -> Tensor:
        self._runs += 1
        return state * self.by


def run(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=torch.arange(3, 12)[None])
        model.generate(input_ids=torch.arange(3, 12)[None], max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("by", [2.0, 1.0 + 1e-9])
def test_a_module_without_weights_makes_another_model(by: float) -> None:
    model = tiny_model("llama")
    found = []
    for factor in (1.0, by, 1.0):
        with LayerSurgeon(model) as surgeon:
            surgeon.replace(range(1, 3), Scale(factor))
            found.append(model_digest(model))
            run(model)
            assert model_digest(model) == found[-1]
    assert found[0] == found[2] != found[1]


class Apply(nn.Module):
    """Keeps a value that is neither a parameter nor a buffer."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, state: Tensor) -> Tensor:
        return state


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor(0.5), torch.tensor(2.0)),
        ([0.5], [2.0]),
        ({"by": (0.5, [1])}, {"by": (0.5, [2])}),
        (np.zeros(2), np.ones(2)),
        (lambda state: state * 0.5, lambda state: state * 2),
        (eval("lambda state: state * 0.5"), eval("lambda state: state * 2")),
        (partial(torch.mul, other=0.5), partial(torch.mul, other=2.0)),
    ],
)
def test_attributes_of_a_module_count(one: Any, other: Any) -> None:
    model = tiny_model("llama")
    found = []
    for value in (one, other, one):
        with LayerSurgeon(model) as surgeon:
            surgeon.replace(range(1, 3), Apply(value))
            found.append(model_digest(model))
            run(model)
            assert model_digest(model) == found[-1]
            assert model_digest(model, attributes=False) != found[-1]
    assert found[0] == found[2] != found[1]


def test_the_order_of_shared_blocks_counts() -> None:
    models = [tiny_model("llama") for _ in range(3)]
    for model, order in zip(models, ([0, 1, 0, 2], [0, 1, 1, 2], [0, 1, 0, 2]), strict=True):
        blocks: Any = model.model.layers
        model.model.layers = nn.ModuleList([blocks[k] for k in order])
    first, second, again = map(model_digest, models)
    assert first == again != second


def test_the_class_of_a_module_counts() -> None:
    models = [tiny_model("llama") for _ in range(2)]
    models[1].model.layers[2].mlp.act_fn = nn.ReLU()
    assert model_digest(models[0]) != model_digest(models[1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.9)),
        (nn.LayerNorm(WIDTH, eps=1e-5), nn.LayerNorm(WIDTH, eps=1e-2)),
        (nn.AvgPool1d(3, 1, 1), nn.AvgPool1d((5,), (1,), (2,))),
        *(
            (nn.TransformerEncoderLayer(WIDTH, 2, 8), nn.TransformerEncoderLayer(WIDTH, *more))
            for more in ((4, 8), (2, 8, 0.1, "gelu"), (2, 8, 0.1, "relu", 1e-5, False, True))
        ),
    ],
)
def test_torchs_own_modules_are_told_by_what_they_do_by(one: nn.Module, other: nn.Module) -> None:
    """No configuration speaks of what a surgeon put in."""
    model = tiny_model("llama")
    other.load_state_dict(one.state_dict())
    found = []
    for module in (one, other, copy.deepcopy(one)):
        with LayerSurgeon(model, probe=False) as surgeon:
            surgeon.replace([1], module)
            found.append(model_digest(model))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_running_a_model_leaves_it_the_same(family: str) -> None:
    model = tiny_model(family)
    before = model_digest(model)
    run(model)
    assert model_digest(model) == before == model_digest(copy.deepcopy(model.train()))
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(1, 3), LinearReplacement(WIDTH))
        surgeon.commit()
    before = model_digest(model)
    run(model)
    assert model_digest(model) == before


@pytest.mark.parametrize("kind", ["LoraConfig", "PromptTuningConfig"])
def test_an_adapter_that_is_off_makes_another_model(kind: str) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    options = {"r": 4, "init_lora_weights": False} if kind == "LoraConfig" else {"num_virtual_tokens": 3}
    model = peft.get_peft_model(tiny_model("llama"), getattr(peft, kind)(task_type="CAUSAL_LM", **options))
    before = model_digest(model)
    run(model)
    assert model_digest(model) == before
    with model.disable_adapter():
        off = model_digest(model)
        run(model)
        assert model_digest(model) == off
    assert model_digest(model) == before != off


def test_which_adapter_is_on_and_how_strong() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config)
    model.add_adapter("other", config)
    found = {model_digest(model)}
    model.set_adapter("other")
    found.add(model_digest(model))
    model.base_model.model.model.layers[0].self_attn.q_proj.scale_layer(2.0)
    assert len(found | {model_digest(model)}) == 3


def test_tokenizers(stories: tuple[Any, Any]) -> None:
    tokenizer = stories[1]
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "a longer text"], padding="max_length", truncation=True, max_length=5)
    assert tokenizer_digest(copy.deepcopy(tokenizer)) == before
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    rules = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rules.normalizer = normalizers.Sequence([rules.normalizer or normalizers.NFC(), normalizers.Replace("q", "k")])
    other = PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>")
    assert tokenizer_digest(other) != before
    assert tokens_digest(other, ["a text"]) == tokens_digest(other, ["a text"]) != tokens_digest(other, ["a quip"])


def test_a_tokenizer_that_says_no_rules_is_told_by_what_it_reads() -> None:
    class Others(Numbers):
        def __call__(self, text: str, add_special_tokens: bool = False) -> Any:
            return super().__call__(text.replace("7", "8"), add_special_tokens)

    assert tokenizer_digest(Numbers(), ["3 7"]) != tokenizer_digest(Others(), ["3 7"])
    assert tokenizer_digest(Numbers(), ["3 4"]) == tokenizer_digest(Others(), ["3 4"])
