"""What is loaded in 4 or 8 bit is ranked, shortened, committed, saved and loaded, or refused with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    QuantoConfig,
)

from streamline_hooks import (
    CompressionConfig,
    DistillationConfig,
    HealingConfig,
    LayerSurgeon,
    StreamlineError,
    compress,
    load,
    profile,
    save,
    train,
)
from streamline_hooks.core import UnsupportedSurgery
from streamline_hooks.distillation import Student, student_of
from streamline_hooks.evaluation import measure_speed
from streamline_hooks.modeling import find_stack
from streamline_hooks.repair import FoldedConfig, NoneConfig, ScaleConfig, fit_windows, insert_replacement
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.selection import block_saliency
from streamline_hooks.testing import assert_restores

IDS = torch.arange(1, 19).view(2, 9)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("original")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantized(folder: Path, bits: str, **options: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    if bits == "4 bit":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float32,
            **options,
        }
    else:
        options = {"load_in_8bit": True, **options}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))
    return exact(model)


def exact(model: Any) -> Any:
    """Keep bitsandbytes to one layout: on some CPUs it runs another one, which state_dict() turns back with loss."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("bits", ["4 bit", "8 bit"])
@pytest.mark.parametrize("window", [range(0, 2), range(2, 4), range(4, 6)], ids=["first", "middle", "last"])
def test_a_removal_in_a_quantized_model_comes_back(bits: str, window: range, original: Path, tmp_path: Path) -> None:
    model = quantized(original, bits)
    linear = type(model.model.layers[0].mlp.up_proj)
    assert linear.__module__.startswith("bitsandbytes")
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(window)
        expected = logits(model)
        plan = surgeon.commit()
    assert len(plan.removed) == 2 and torch.equal(logits(model), expected)
    save(model, tmp_path / "model")
    for loaded in (load(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        assert type(loaded.model.layers[0].mlp.up_proj) is linear and len(loaded.model.layers) == 4
        torch.testing.assert_close(logits(exact(loaded)), expected)


@pytest.mark.parametrize("bits", ["4 bit", "8 bit"])
def test_a_module_named_to_stay_in_full_precision_still_does(bits: str, original: Path, tmp_path: Path) -> None:
    model = quantized(original, bits, llm_int8_skip_modules=["model.layers.4.mlp", "lm_head"])
    assert type(model.model.layers[4].mlp.up_proj) is torch.nn.Linear
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1, 2])
        expected = logits(model)
        surgeon.commit()
    save(model, tmp_path / "model")
    loaded: Any = load(tmp_path / "model")
    plain = [k for k in range(4) if type(loaded.model.layers[k].mlp.up_proj) is torch.nn.Linear]
    assert plain == [2]
    torch.testing.assert_close(logits(exact(loaded)), expected)


@pytest.mark.parametrize("bits", ["4 bit", "8 bit"])
def test_a_quantized_model_is_ranked(bits: str, original: Path) -> None:
    model = quantized(original, bits)
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    ours, plain = (profile(each, batches) for each in (model, LlamaForCausalLM.from_pretrained(original)))
    torch.testing.assert_close(ours.cosine, plain.cosine, rtol=0, atol=0.05)


@pytest.mark.parametrize("bits", ["4 bit", "8 bit"])
def test_a_splice_in_a_quantized_model_is_refused_before_anything_changes(bits: str, original: Path) -> None:
    model = quantized(original, bits)
    before = logits(model)
    with pytest.raises(
        UnsupportedSurgery, match="bitsandbytes.*load its checkpoint with quantization_config"
    ) as raised:
        with LayerSurgeon(model) as surgeon:
            surgeon.replace([2, 3], LinearReplacement(64))
            assert logits(model).isfinite().all()  # in memory it works
            surgeon.commit()
    assert raised.value.cause == "quantized"
    assert type(model) is LlamaForCausalLM and torch.equal(logits(model), before)


def test_a_block_in_full_precision_among_quantized_ones_is_refused(original: Path) -> None:
    block = copy.deepcopy(LlamaForCausalLM.from_pretrained(original).model.layers[2])
    with pytest.raises(UnsupportedSurgery, match=r"model\.layers\.2\.self_attn\.q_proj is in full precision"):
        with LayerSurgeon(quantized(original, "8 bit")) as surgeon:
            surgeon.replace([2, 3], block)
            surgeon.commit()


@pytest.mark.parametrize("bits", ["4 bit", "8 bit"])
def test_what_was_replaced_in_full_precision_is_loaded_quantized(bits: str, original: Path, tmp_path: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(original)
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([2, 3], LinearReplacement.from_map(0.1 * torch.randn(64, 64)))
        surgeon.commit()
    save(model, tmp_path / "model")
    loaded = quantized(tmp_path / "model", bits)
    gap = (logits(loaded) - logits(model)).abs().max() / logits(model).abs().max()
    assert 0 < gap < 0.5
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(exact(again)), logits(loaded))
    with pytest.raises(ValueError, match="quant_method"):
        LlamaForCausalLM.from_pretrained(tmp_path / "again", ignore_mismatched_sizes=True)


def test_quanto_is_refused_with_the_reason(original: Path) -> None:
    pytest.importorskip("optimum.quanto")
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=QuantoConfig(weights="int8"))
    before = logits(model)
    with pytest.raises(StreamlineError, match="quantized with quanto, which Transformers cannot save.*full precision"):
        with LayerSurgeon(model) as surgeon:
            surgeon.remove([2, 3])
            surgeon.commit()
    assert len(model.model.layers) == 6 and torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_is_refused_with_the_reason(original: Path) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(original)
    try:
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"this PyTorch has no dynamic quantization: {error}")
    before = logits(model)
    with pytest.raises(StreamlineError, match=r"quantized\.dynamic.*packed weights.*before quantizing"):
        with LayerSurgeon(model) as surgeon:
            surgeon.remove([2, 3])
            surgeon.commit()
    assert len(model.model.layers) == 6 and torch.equal(logits(model), before)


def test_a_refused_commit_leaves_what_bitsandbytes_runs_as_it_is(original: Path) -> None:
    """Without `exact`: on CPUs for which bitsandbytes has a layout of its own, this is what users run."""
    bnb = pytest.importorskip("bitsandbytes")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=options)
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    before = logits(model)
    with pytest.raises(UnsupportedSurgery):
        with LayerSurgeon(model) as surgeon:
            surgeon.replace([2], LinearReplacement(64))
            surgeon.commit()
    assert torch.equal(logits(model), before)
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([2])
        expected = logits(model)
        surgeon.commit()
    assert torch.equal(logits(model), expected)


BATCHES = [{"input_ids": IDS + k} for k in range(4)]
ADAPTERS = HealingConfig("lora", where="after", rank=4)


@pytest.mark.parametrize("first", ["copy", "original"])
@pytest.mark.parametrize("bits", ["4 bit", "8 bit"])
def test_copies_with_adapters_share_quantized_weights(bits: str, first: str, original: Path) -> None:
    """A layer of 8 bit takes its scales from the weight when it runs first; a copy without them gives other numbers."""
    model = quantized(original, bits)
    student = student_of(find_stack(model), [(range(2, 4), LinearReplacement(64))], ADAPTERS)
    block, duplicate = model.model.layers[4], student.copies[4]
    pairs = [(block.mlp.up_proj, duplicate.mlp.up_proj.get_base_layer())]  # type: ignore[union-attr]
    states = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = states @ AutoModelForCausalLM.from_pretrained(original).model.layers[4].mlp.up_proj.weight.T
    for ours, theirs in pairs:
        layers = (theirs, ours) if first == "copy" else (ours, theirs)
        with torch.no_grad():
            outputs = [layer(states) for layer in layers]
        assert (
            outputs[0] - outputs[1]
        ).norm() < 0.02 * expected.norm() and ours.weight.data_ptr() == theirs.weight.data_ptr()
        assert (outputs[0] - expected).norm() < 0.2 * expected.norm()


def trained_student(model: Any) -> tuple[Student, LinearReplacement]:
    module = LinearReplacement(64)
    student = student_of(find_stack(model), [(range(2, 4), module)], ADAPTERS)
    trained = train(student, BATCHES, BATCHES[:1], DistillationConfig(validations=1, learning_rate=1e-2, epochs=4))
    assert trained.distance < trained.distance_before
    return student, module


def changed_for_inference(model: Any) -> Any:
    """Change 4-bit weights to the layout that bitsandbytes uses in a run without gradients on CPUs with bfloat16."""
    convert = pytest.importorskip("bitsandbytes.functional")._convert_weight_packed_for_cpu
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.weight.data, layer.weight.quant_state = convert(layer.weight.data, layer.weight.quant_state)
    return model


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


ROUNDED_SCALES = 0.02  # of the logits and gradients here
RUNS: dict[str, Callable[[Any, Path], object]] = {
    "profile": lambda model, folder: profile(model, [IDS]),
    "save": lambda model, folder: save(model, folder),
    "speed": lambda model, folder: measure_speed({"it": model}, tokens=4, new_tokens=2, repeats=1, warm_up=0),
    "saliency": lambda model, folder: block_saliency(model, [IDS], [1]),
    "assertion": lambda model, folder: assert_restores(model, nullcontext),
    "student": lambda model, folder: student_of(find_stack(model), [(range(2, 4), LinearReplacement(64))], None),
}


@pytest.mark.parametrize("double", [False, True], ids=["one scale", "two scales"])
@pytest.mark.parametrize("name", RUNS)
def test_4_bit_weights_that_ran_before_stay_the_same(name: str, double: bool, original: Path, tmp_path: Path) -> None:
    """The conversion back of bitsandbytes 0.50 reorders single scales, which changes the logits by half of their size.

    A block in full precision has gradients, see `block_saliency`.
    """
    options = {"bnb_4bit_use_double_quant": double, "llm_int8_skip_modules": ["model.layers.1", "lm_head"]}
    expected = logits(quantized(original, "4 bit", **options))
    model = changed_for_inference(quantized(original, "4 bit", **options))
    RUNS[name](model, tmp_path / "model")
    assert distance(logits(model), expected) < ROUNDED_SCALES
    loaded: Any = load(save(model, tmp_path / "saved"))
    assert distance(logits(exact(loaded)), expected) < ROUNDED_SCALES


def test_saliency_before_4_bit_weights_that_ran_before(original: Path) -> None:
    options = {"llm_int8_skip_modules": ["model.layers.1", "lm_head"]}
    before, after = (
        block_saliency(model, [IDS], [1])[1]
        for model in (
            quantized(original, "4 bit", **options),
            changed_for_inference(quantized(original, "4 bit", **options)),
        )
    )
    assert after == pytest.approx(before, rel=ROUNDED_SCALES)


@pytest.mark.parametrize("healing", [None, ADAPTERS])
def test_gradients_pass_4_bit_weights_that_ran_before(healing: HealingConfig | None, original: Path) -> None:
    gradients = []
    for change in (exact, changed_for_inference):
        model = change(quantized(original, "4 bit"))
        student = student_of(find_stack(model), [(range(2, 4), LinearReplacement(64))], healing)
        with student.applied():
            model(IDS).logits.square().mean().backward()
        (name,) = (name for name in student.parameters() if name.startswith("2-3."))
        gradient = student.parameters()[name].grad
        assert gradient is not None and gradient.norm() > 0
        gradients.append(gradient)
    assert distance(gradients[1], gradients[0]) < ROUNDED_SCALES


def test_speed_is_measured_in_the_layout_for_inference(original: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(original, quantization_config=settings)
    layer, changed = model.model.layers[3].mlp.down_proj, []
    layer.register_forward_hook(
        lambda *_: changed.append(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))
    )
    measure_speed({"it": model}, tokens=4, new_tokens=2, repeats=1, warm_up=0)
    assert set(changed) == {layer.support_avx512bf16_for_cpu}
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.parametrize("change", [lambda model: model, changed_for_inference], ids=["saved", "inference"])
def test_no_run_of_the_library_changes_the_layout(change: Callable[[Any], Any], original: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model: Any = change(AutoModelForCausalLM.from_pretrained(original, quantization_config=settings))
    layer = model.model.layers[3].mlp.down_proj
    was_supported = layer.support_avx512bf16_for_cpu
    profile(model, [IDS])
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert layer.support_avx512bf16_for_cpu == was_supported


@pytest.mark.parametrize("bits", ["4 bit", "8 bit"])
def test_adapters_of_quantized_weights_are_added_to_the_original(bits: str, original: Path, tmp_path: Path) -> None:
    small = quantized(original, bits)
    student, module = trained_student(small)
    with pytest.raises(StreamlineError, match=r"quantized weights.*add_adapters_to"):
        student.merge()
    with pytest.raises(StreamlineError, match=r"Pass the model in full precision"):
        student.add_adapters_to(quantized(original, bits))
    whole: Any = AutoModelForCausalLM.from_pretrained(original)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    student.add_adapters_to(whole)
    added = {name: value - before[name] for name, value in whole.state_dict().items() if not value.equal(before[name])}
    layers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    layers += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert set(added) == {f"model.layers.{k}.{name}.weight" for k in (4, 5) for name in layers}
    assert max(int(torch.linalg.matrix_rank(delta.double(), rtol=1e-3)) for delta in added.values()) <= 4
    with student.applied():
        expected = logits(small)
    with LayerSurgeon(whole) as surgeon:
        insert_replacement(surgeon, range(2, 4), module)
        surgeon.commit()
    whole.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(whole))
    with torch.no_grad():
        error = (logits(AutoModelForCausalLM.from_pretrained(original)) - logits(small)).norm()  # of the quantization
        assert (logits(whole) - expected).norm() < 2 * error


def test_added_adapters_are_those_that_merging_gives(original: Path) -> None:
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(original) for _ in range(2)]
    student, _ = trained_student(models[0])
    student.add_adapters_to(models[1])
    student.merge()
    student.copy_weights_to_model()
    changed = 0
    for (name, value), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7, msg=name)
        changed += not value.equal(AutoModelForCausalLM.from_pretrained(original).get_parameter(name))
    assert changed == 14


def test_healing_of_quantized_weights_is_refused_before_anything_runs(original: Path) -> None:
    config = CompressionConfig(remove=2, repair=NoneConfig(), healing=ADAPTERS, distillation=DistillationConfig())
    names = ("calibration", "validation", "test")
    parts = {name: [{"input_ids": IDS + 20 * k}] for k, name in enumerate(names)}
    with pytest.raises(StreamlineError, match=r"quantized weights.*add_adapters_to"):
        compress(quantized(original, "4 bit"), parts, config)


def test_other_copies_are_not_added(original: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(original)
    window = [(range(2, 4), LinearReplacement(64))]
    partial = student_of(find_stack(model), window, HealingConfig("partial", where="after"))
    with pytest.raises(StreamlineError, match=r"block 4 has no adapters.*copy_weights_to_model"):
        partial.add_adapters_to(model)
    head = student_of(find_stack(model), window, HealingConfig("lora", head=True))
    with pytest.raises(StreamlineError, match=r"lm_head outside the blocks.*without head"):
        head.add_adapters_to(model)


@pytest.mark.parametrize("kind", ["folded", "scale"])
def test_adapters_of_blocks_with_a_replacement_inside_are_not_added(kind: str, original: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(original)
    config = {"folded": FoldedConfig(), "scale": ScaleConfig()}[kind]
    (fit,) = fit_windows(model, [range(2, 4)], config, BATCHES, BATCHES[:1])
    student = student_of(find_stack(model), [(range(2, 4), fit.replacement_module)], HealingConfig("lora"))
    with pytest.raises(StreamlineError, match=r"part of a block.*copy_weights_to_model"):
        student.add_adapters_to(AutoModelForCausalLM.from_pretrained(original))


def test_adapters_of_transposed_layers_are_added_in_their_orientation(tmp_path: Path) -> None:
    """GPT-2 has Conv1D layers, which bitsandbytes loads as linear layers; some are square, so shapes do not tell."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=6, n_head=2)).save_pretrained(tmp_path)
    small = quantized(tmp_path, "4 bit")
    student, _ = trained_student(small)
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    student.add_adapters_to(whole)
    for name in ("attn.c_proj", "mlp.c_fc"):
        layer: Any = student.copies[5].get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = layer.scaling["default"] * (b @ a)
        added = whole.transformer.h[5].get_submodule(name).weight - before[f"transformer.h.5.{name}.weight"]
        torch.testing.assert_close(added, expected.T, rtol=1e-3, atol=1e-6)
