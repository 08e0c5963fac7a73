"""Measures of next tokens refuse models in which a token also sees later ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig

from streamline_hooks import HiddenStateRecorder, StreamlineError, perplexity
from streamline_hooks.distillation import DistillationConfig, Student, train
from streamline_hooks.evaluation import Suite, evaluate, sliding_perplexity
from streamline_hooks.modeling.probe import refuse_later_tokens
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import tiny_model
from tests.tiny_models import tokens


class NumberTokenizer:
    """Tokens are the numbers in a text."""

    bos_token_id = eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def bert(is_decoder: bool) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        is_decoder=is_decoder,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", ["xlnet", "xlm"])
def test_bidirectional_types_have_no_perplexity(model_type: str) -> None:
    with pytest.raises(StreamlineError, match=r"depend on later tokens.*Perplexity needs.*is_decoder=True"):
        perplexity(tiny_model(model_type), [tokens(2, 6)])


@pytest.mark.parametrize("model_type", ["openai-gpt", "rwkv", "mamba", "roformer", "bloom", "megatron-bert", "llama"])
def test_causal_types_have_one(model_type: str) -> None:
    assert perplexity(tiny_model(model_type), [tokens(2, 6)]).tokens == 10


def test_bert_has_a_perplexity_as_a_decoder_only() -> None:
    text = ["3 4 5 6 7 8", "9 10 11"]
    assert perplexity(bert(is_decoder=True), [tokens(2, 6)]).tokens == 10
    assert sliding_perplexity(bert(is_decoder=True), NumberTokenizer(), text).tokens == 9
    model = bert(is_decoder=False)
    with pytest.raises(StreamlineError, match="BertLMHeadModel depend on later tokens"):
        perplexity(model, [tokens(2, 6)])
    with pytest.raises(StreamlineError, match="BertLMHeadModel depend on later tokens"):
        sliding_perplexity(model, NumberTokenizer(), text)
    with pytest.raises(StreamlineError, match=r"later tokens.*A suite with text needs"):
        evaluate(model, NumberTokenizer(), Suite(text={"numbers": text}))


def test_the_loss_of_the_text_needs_a_causal_model() -> None:
    batches = [{"input_ids": tokens(2, 6)}]

    def run(is_decoder: bool, loss: dict[str, float]) -> None:
        student = Student(bert(is_decoder), [(range(1, 2), LinearReplacement(32))])
        train(student, batches, batches, DistillationConfig(loss=loss, epochs=1))

    run(True, {"kl": 1.0, "lm": 0.5})
    run(False, {"kl": 1.0})
    with pytest.raises(StreamlineError, match=r"later tokens.*The loss kl \+ 0.5\*lm needs"):
        run(False, {"kl": 1.0, "lm": 0.5})


def test_the_check_leaves_no_trace() -> None:
    model = tiny_model("openai-gpt").train()
    state = torch.get_rng_state()
    with HiddenStateRecorder(model, [1]) as record:
        refuse_later_tokens(model, "Perplexity")
    assert not record.outputs[1] and model.training
    assert torch.equal(torch.get_rng_state(), state)
