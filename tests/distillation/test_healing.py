"""Healing: the teacher keeps its weights, adapters merge into plain blocks, and nothing is left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from streamline_hooks import LayerSurgeon, StreamlineError
from streamline_hooks.cli import parse_healing, parse_replacement
from streamline_hooks.distillation.config import DistillationConfig
from streamline_hooks.distillation.healing import HealingConfig, healing_copies, student_of
from streamline_hooks.distillation.student import Student, merge_adapters
from streamline_hooks.distillation.train import train
from streamline_hooks.modeling import find_stack
from streamline_hooks.repair import BlockConfig, fit_windows, insert_replacement
from streamline_hooks.replacements import LinearReplacement, SwiGLUReplacement
from streamline_hooks.testing import tiny_model
from tests.distillation.test_train import BATCHES, VALIDATION

WINDOW = range(2, 4)
SETTINGS = DistillationConfig(epochs=3, learning_rate=1e-2, validations=3)


def healed(model: nn.Module, healing: HealingConfig) -> Student:
    stack = find_stack(model)
    copies, outside = healing_copies(stack, [WINDOW], healing)
    features = model.get_input_embeddings().weight.shape[1]
    return Student(model, [(WINDOW, LinearReplacement(features))], copies=copies, outside=outside)


@pytest.mark.sample(2)
@pytest.mark.parametrize("type_", ["llama", "gpt2"])
@pytest.mark.parametrize("text", ["lora:rank=4,dropout=0.1", "partial:where=after", "partial:where=beside,count=1"])
def test_healing_helps_and_the_original_is_untouched(type_: str, text: str) -> None:
    model: Any = tiny_model(type_)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    student = healed(model, parse_healing(text))
    trained = train(student, BATCHES, VALIDATION, SETTINGS)
    assert trained.distance < trained.distance_before
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("text", ["lora:rank=4,alpha=8", "partial:where=after"])
def test_what_is_settled_says_what_the_student_said_and_is_plain(text: str) -> None:
    model: Any = tiny_model("llama")
    names = list(model.state_dict())
    student = healed(model, parse_healing(text))
    train(student, BATCHES, VALIDATION, SETTINGS)
    model.eval()
    ids = BATCHES[0]["input_ids"]
    with torch.no_grad():
        student.training = False
        with student.applied():
            wanted = model(ids).logits
        student.merge()
        with student.applied():
            torch.testing.assert_close(model(ids).logits, wanted)
        student.copy_weights_to_model()
        with LayerSurgeon(model) as surgeon:
            surgeon.replace(*student.replacement_modules[0])
            torch.testing.assert_close(model(ids).logits, wanted)
    assert list(model.state_dict()) == names


EVEN = DistillationConfig(
    learning_rate=1e-3, weight_decay=0.0, warmup_ratio=0.0, min_lr_ratio=1.0, max_grad_norm=0.0, validations=1
)
"""Steps of Adam whose length is about the learning rate."""


@pytest.mark.parametrize("rate", [1.0, 0.01])
def test_what_stays_learns_at_its_own_rate(rate: float) -> None:
    """A step of Adam is about as long as its rate."""
    model = tiny_model("llama")
    healing = HealingConfig("partial", "after", learning_rate_ratio=rate)
    student = student_of(find_stack(model), [(range(2, 4), LinearReplacement(32))], healing)
    before = {name: p.detach().clone() for name, p in student.parameters().items()}
    trained = train(student, BATCHES, BATCHES, replace(EVEN, scale_parameter=False))
    assert trained.best_step == trained.steps, "the weights that are back are not the last ones"
    moved = {name: float((p - before[name]).abs().max()) for name, p in student.parameters().items()}
    stays = [most for name, most in moved.items() if not name.startswith("2-3.")]
    longest = trained.steps * EVEN.learning_rate
    assert len(stays) > 9 and 0.2 * rate * longest < max(stays) < 1.5 * rate * longest
    assert 0.2 * longest < moved["2-3.0.projection.weight"] < 1.5 * longest


def rms(weight: torch.Tensor) -> float:
    return float(weight.detach().square().mean().sqrt())


@pytest.mark.parametrize("size", [0.05, 0.5])
def test_a_step_changes_weights_of_any_size_by_the_same_fraction(size: float) -> None:
    """Matrices of healed and inherited blocks, and new modules by the size of the first changed block."""
    model: Any = tiny_model("llama")
    with torch.no_grad():
        for name, parameter in model.model.layers.named_parameters():
            if "layernorm" in name:
                parameter.div_(size)  # the function stays the same
            elif "o_proj" not in name and "down_proj" not in name:
                parameter.mul_(size)
    stack, healing = find_stack(model), HealingConfig("partial", "last", 1, learning_rate_ratio=0.5)
    inherited = BlockConfig(solve=False).build(stack, range(2, 4))
    student = student_of(stack, [(range(2, 4), inherited), (range(5, 6), LinearReplacement(32))], healing)
    before = {name: p.detach().clone() for name, p in student.parameters().items()}
    of_first_block = [rms(p) for p in model.model.layers[2].parameters() if p.ndim > 1]
    assert len(of_first_block) == 7
    expected = {
        name: {"2-3": 1.0, "5-5": 1.0, "7": 0.5}[name.partition(".")[0]]
        * (1.0 if p.ndim == 1 else (median(of_first_block) if name.startswith("5-5") else rms(p)) / 0.2)
        for name, p in before.items()
    }
    found = {name: student.learning_rate_factor(name, scale_parameter=True) for name in before}
    assert found == pytest.approx(expected, rel=1e-4)
    trained = train(student, BATCHES, BATCHES, EVEN)
    assert trained.best_step == trained.steps
    for name, parameter in student.parameters().items():
        moved = float((parameter - before[name]).abs().max())
        longest = expected[name] * trained.steps * EVEN.learning_rate
        assert 0.2 * longest < moved < 1.5 * longest, name


def test_rates_of_adapters_are_not_scaled_and_tiny_weights_still_learn() -> None:
    model: Any = tiny_model("llama", attention_bias=True)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight.fill_(1e-9)
    stack = find_stack(model)
    adapted = student_of(stack, [], HealingConfig("lora", learning_rate_ratio=0.5))
    assert {adapted.learning_rate_factor(name, scale_parameter=True) for name in adapted.parameters()} == {0.5}
    healed = student_of(stack, [], HealingConfig("partial", learning_rate_ratio=0.5))
    of_matrix, of_bias = (f"0.0.self_attn.q_proj.{name}" for name in ("weight", "bias"))
    assert healed.learning_rate_factor(of_matrix, scale_parameter=True) == pytest.approx(0.5 * 0.005)
    assert healed.learning_rate_factor(of_bias, scale_parameter=True) == 0.5
    assert {healed.learning_rate_factor(name) for name in healed.parameters()} == {0.5}


def new_module_factor(model: nn.Module) -> float:
    student = Student(model, [(range(2, 4), LinearReplacement(64))])
    return student.learning_rate_factor("2-3.0.projection.weight", scale_parameter=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_new_modules_of_a_quantized_model_learn_at_the_same_rate(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", hidden_size=64)
    model.save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    quantized: Any = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    assert not quantized.model.layers[2].mlp.up_proj.weight.is_floating_point()
    for _ in range(2):
        assert new_module_factor(quantized) == pytest.approx(new_module_factor(model), rel=0.05)
        quantized(torch.arange(3, 35)[None])  # may change the layout of the weights


def test_new_modules_of_an_offloaded_model_learn_at_the_same_rate() -> None:
    model = tiny_model("llama", hidden_size=64)
    wanted = new_module_factor(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert new_module_factor(model) == wanted
    assert next(model.model.layers[2].parameters()).is_meta


def test_adapters_and_earlier_replacements_do_not_change_the_rate_of_new_modules() -> None:
    peft = pytest.importorskip("peft")
    model: Any = tiny_model("llama", hidden_size=64)
    wanted = new_module_factor(model)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace(range(5, 7), SwiGLUReplacement(64))
        surgeon.commit()
    assert Student(model, [(range(5, 6), LinearReplacement(64))]).learning_rate_factor(
        "5-5.0.projection.weight", scale_parameter=True
    ) == pytest.approx(median(rms(p) for p in model.model.layers[5].self_attn.parameters()) / 0.2, rel=0.05)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert new_module_factor(adapted) == wanted


def test_rates_of_new_modules_need_weights_whose_size_is_known() -> None:
    """Such as those of formats that keep integers in buffers."""
    model: Any = tiny_model("llama", hidden_size=64)
    for layer in model.model.layers[2].modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(StreamlineError, match="LlamaDecoderLayer has no matrix of .* Set scale_parameter=False"):
        new_module_factor(model)
    student = Student(model, [(range(2, 4), LinearReplacement(64))])
    assert student.learning_rate_factor("2-3.0.projection.weight") == 1


def test_adapters_share_the_weights_that_they_do_not_train() -> None:
    model: Any = tiny_model("llama")
    copies, _ = healing_copies(find_stack(model), [WINDOW], HealingConfig(rank=2))
    assert sorted(copies) == [0, 1, 4, 5, 6, 7]
    held = {p.data_ptr() for p in model.parameters()}
    for block in copies.values():
        frozen = [p for p in block.parameters() if not p.requires_grad]
        assert {p.data_ptr() for p in frozen} <= held
        assert all("lora" in name for name, p in block.named_parameters() if p.requires_grad)
    merge_adapters(copies[0])
    assert copies[0].mlp.up_proj.weight.data_ptr() not in held


def test_only_the_layers_that_are_named_get_adapters() -> None:
    copies, _ = healing_copies(
        find_stack(tiny_model("llama")),
        [WINDOW],
        HealingConfig(method="lora", rank=2, targets=("up_proj", "down_proj")),
    )
    trained = {name.split(".lora")[0] for name, p in copies[0].named_parameters() if p.requires_grad}
    assert trained == {"mlp.up_proj", "mlp.down_proj"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("lora", [0, 1, 2, 5, 6, 9]),
        ("partial:where=after", [5, 6, 9]),
        ("partial:where=beside,count=1", [2, 5, 6, 9]),
        ("partial:where=last,count=2", [9]),
    ],
)
def test_which_blocks_are_trained(text: str, wanted: list[int]) -> None:
    assert parse_healing(text).blocks(10, [range(3, 5), range(7, 9)]) == wanted


def test_the_head_is_trained_where_it_is_not_the_embedding() -> None:
    model: Any = tiny_model("llama")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    before = model.lm_head.weight.detach().clone()
    student = healed(model, HealingConfig(method="partial", where="last", count=1, head=True))
    assert {name.partition(".")[0] for name in student.parameters()} == {"2-3", "7", "lm_head"}
    train(student, BATCHES, VALIDATION, SETTINGS)
    assert torch.equal(model.lm_head.weight, before)
    student.copy_weights_to_model()
    assert not torch.equal(model.lm_head.weight, before)
    alone = student_of(
        find_stack(model), [(range(6, 8), None)], HealingConfig(method="partial", where="after", head=True)
    )
    assert list(alone.parameters()) == ["lm_head.0.weight"], "no block is behind the window, and the head is"
    tied: Any = tiny_model("gpt2")
    with pytest.raises(StreamlineError, match=r"transformer\.wte\.weight.*Train"):
        healed(tied, HealingConfig(method="partial", where="last", count=1, head=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("full", r"method='full'.*lora, partial"),
        ("lora:rank=x", "rank='x'.*Expected int"),
        ("lora:head=ture", "head='ture'.*Expected bool"),
        ("partial:targets=down_proj,rank=4", r"'partial'.*rank, targets.*adapters"),
        ("lora:size=2", r"'size'.*Expected one of where .str., count .int., learning_rate_ratio"),
        ("partial:learning_rate_ratio=0", r"learning_rate_ratio=0.0.*\(0, inf\)"),
        ("partial:where=beside", r"count=0.*at least 1"),
        ("partial:count=2", r"count=2.*Expected"),
        ("lora:dropout=1.0", r"dropout=1.0.*\[0, 1\)"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        parse_healing(text)


def test_no_block_and_no_layer_are_refused() -> None:
    stack = find_stack(tiny_model("llama"))
    with pytest.raises(StreamlineError, match=r"8 blocks.*6 to 7 are removed"):
        healing_copies(stack, [range(6, 8)], HealingConfig(method="partial", where="last", count=2))
    with pytest.raises(StreamlineError, match=r"LlamaDecoderLayer.*fc1"):
        healing_copies(stack, [WINDOW], HealingConfig(method="lora", targets=("fc1",)))


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", ["folded", "scale"])
@pytest.mark.parametrize("text", ["lora:rank=2", "partial:where=beside,count=1", "partial:where=after"])
def test_what_is_folded_into_a_block_is_in_its_copy_too(kind: str, text: str) -> None:
    model: Any = tiny_model("llama")
    ids = BATCHES[0]["input_ids"]
    (repair,) = fit_windows(model, [WINDOW], parse_replacement(kind), BATCHES, VALIDATION)
    student = student_of(find_stack(model), [(WINDOW, repair.replacement_module)], parse_healing(text))
    student.training = False
    with torch.no_grad():
        with LayerSurgeon(model) as surgeon:
            insert_replacement(surgeon, WINDOW, repair.replacement_module)
            wanted = model(ids).logits
        with student.applied():
            torch.testing.assert_close(model(ids).logits, wanted)
        for parameter in student.parameters().values():
            parameter.add_(0.02)
        with student.applied():
            trained = model(ids).logits
        student.merge()
        with LayerSurgeon(model) as surgeon:
            insert_replacement(surgeon, WINDOW, repair.replacement_module)
            surgeon.commit()
        student.copy_weights_to_model()
        torch.testing.assert_close(model(ids).logits, trained)
        assert not torch.allclose(trained, wanted)


def test_adapters_start_the_same_for_a_seed_and_leave_the_callers_numbers_alone() -> None:
    stack = find_stack(tiny_model("llama"))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    made = [healing_copies(stack, [WINDOW], HealingConfig(rank=2), seed=seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (dict(copies[0].named_parameters()) for copies in made)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any("lora_A" in name and not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("windows", [[WINDOW], []])
def test_blocks_that_no_gradient_would_reach_are_refused(windows: list[range]) -> None:
    model: Any = tiny_model("llama")
    copies, _ = healing_copies(find_stack(model), [WINDOW], HealingConfig(method="partial", where="last", count=1))
    student = Student(model, [(window, None) for window in windows], copies=copies)
    settings = replace(SETTINGS, loss={"mse": 1.0, "cosine": 1.0})
    with pytest.raises(StreamlineError, match=r"mse \+ cosine.*block 7.*Add kl or lm"):
        train(student, BATCHES, VALIDATION, settings)


def test_layers_that_peft_refuses_are_named() -> None:
    with pytest.raises(StreamlineError, match=r"out_proj.*MambaBlock.*other targets"):
        healing_copies(find_stack(tiny_model("mamba")), [WINDOW], HealingConfig(rank=2))


@pytest.mark.parametrize(
    ("text", "head"), [("lora:head", True), ("lora:head=True", True), ("lora:head=false", False), ("lora", False)]
)
def test_whether_the_head_is_trained_is_read_either_way(text: str, head: bool) -> None:
    assert parse_healing(text).head is head


@pytest.mark.sample(2)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("text", ["lora:rank=4", "partial:where=all", "partial:where=beside,count=1"])
def test_checkpointed_blocks_are_trained_like_others(text: str, reentrant: bool) -> None:
    """A reentrant checkpoint gives no gradient where its input needs none."""
    found = []
    for checkpointed in (False, True):
        model: Any = tiny_model("llama")
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        student = healed(model, parse_healing(text))
        before = {name: p.detach().clone() for name, p in student.parameters().items()}
        train(student, BATCHES, VALIDATION, replace(SETTINGS, epochs=1))
        found.append(student.parameters())
        still = {name for name, p in student.parameters().items() if torch.equal(p, before[name])}
        assert not still, "some were not trained"
    for name, parameter in found[0].items():
        torch.testing.assert_close(found[1][name], parameter, rtol=1e-4, atol=1e-6)


def test_a_zeroed_attention_stays_zero_in_an_inherited_block() -> None:
    model: Any = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(3, "attention")
        surgeon.commit()
    (repair,) = fit_windows(model, [range(3, 6)], BlockConfig(solve=False), BATCHES, VALIDATION)
    student = student_of(find_stack(model), [(range(3, 6), repair.replacement_module)])
    train(student, BATCHES, VALIDATION, SETTINGS)
    assert not repair.replacement_module.self_attn.o_proj.weight.any()
    assert repair.replacement_module.mlp.down_proj.weight.requires_grad
