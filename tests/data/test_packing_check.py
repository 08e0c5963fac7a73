from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from streamline_hooks.core import StreamlineError
from streamline_hooks.data import check_packing, packed_batches
from streamline_hooks.testing import tiny_model as tiny_model_of
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


def rows(*lengths: list[int], batch_size: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [[torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in row] for row in lengths]
    return packed_batches(made, batch_size)


PACKED = rows([9, 14, 1, 16], [20, 20])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, attention: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    if family == "opt":
        with pytest.raises(StreamlineError, match=r"OPTForCausalLM mixes the documents"):
            check_packing(model, PACKED)
    elif TRANSFORMERS_5 or family in ("llama", "qwen3"):
        check_packing(model, PACKED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_an_attention_mask_makes_the_same_rows_cross_and_is_found_out_in_any_dtype(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    check_packing(model, PACKED)
    crossing = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in PACKED]
    with pytest.raises(StreamlineError, match=r"block \d.*\d+ to \d+ differs"):
        check_packing(model, crossing)


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "mamba", "mamba2", "rwkv", "jamba", "xlnet"])
def test_models_that_mix_documents_are_refused_by_name(model_type: str) -> None:
    model = tiny_model_of(model_type, blocks=4)
    with pytest.raises(StreamlineError, match=rf"^{type(model).__name__}.*Give"):
        check_packing(model, PACKED)


def test_positions_that_go_on_are_refused() -> None:
    """GPT-2 looks its positions up, so a document in the middle of a row is another one there."""
    batch = {**PACKED[0], "position_ids": PACKED[0]["position_ids"] + 1}
    with pytest.raises(StreamlineError, match=r"GPT2LMHeadModel.*block 0.*0 to 8 differs"):
        check_packing(tiny_model("gpt2"), [batch])


class Plain(nn.Module):
    """Adds up what stands before each token, in one document or not."""

    def __init__(self, takes_positions: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(Summed() for _ in range(3))
        self.calls = 0
        if takes_positions:
            self.forward = self.with_positions  # type: ignore[method-assign]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        state = self.embed(input_ids)
        for layer in self.layers:
            state = layer(state)
        return state

    def with_positions(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if position_ids is not None and bool((position_ids.diff() < 0).any()):
            raise ValueError("positions must grow")
        return Plain.forward(self, input_ids)


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state + self.mix(state).cumsum(dim=1)


def test_a_forward_without_positions_is_refused_without_being_run() -> None:
    model = Plain()
    with pytest.raises(StreamlineError, match=r"Plain.*packed rows.*position_ids"):
        check_packing(model, PACKED)
    assert model.calls == 0


def test_a_forward_that_fails_on_packed_rows_is_refused() -> None:
    message = r"Plain.*packed rows.*ValueError: positions must grow.*Give"
    with pytest.raises(StreamlineError, match=message):
        check_packing(Plain(takes_positions=True), PACKED)


def test_the_rows_with_most_pieces_are_run() -> None:
    """What only a later batch brings is found, and what no row divides needs no run."""
    whole = rows([40], [40])
    check_packing(Plain(takes_positions=True), whole)
    model = tiny_model("opt")
    check_packing(model, whole)
    with pytest.raises(StreamlineError, match="OPTForCausalLM"):
        check_packing(model, [*whole, *rows([40], [20, 20], batch_size=2)])


def test_only_batches_of_one_row_are_respected() -> None:
    """So do flash attentions that see packed rows in a batch of one alone."""
    model = tiny_model("llama")

    def one_row_only(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if len(kwargs["input_ids"]) > 1:
            kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
        return args, kwargs

    model.register_forward_pre_hook(one_row_only, with_kwargs=True)
    check_packing(model, rows([9, 14, 1, 16], [20, 20], batch_size=1))
    with pytest.raises(StreamlineError, match="LlamaForCausalLM mixes the documents"):
        check_packing(model, PACKED)


def test_batches_that_are_not_packed() -> None:
    batch = {"input_ids": PACKED[0]["input_ids"], "attention_mask": torch.ones_like(PACKED[0]["input_ids"])}
    with pytest.raises(StreamlineError, match=r"\['attention_mask'.*'input_ids'\].*position_ids.*Expected"):
        check_packing(tiny_model("llama"), [batch])


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    check_packing(model, PACKED)
    assert model.training and all(not module._forward_hooks for module in model.modules())
