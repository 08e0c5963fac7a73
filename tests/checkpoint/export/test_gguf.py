"""What is written as GGUF is read back, by Transformers' own reader, as the same model and the same tokens."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from streamline_hooks import LayerSurgeon, StreamlineError, find_stack
from streamline_hooks.checkpoint import export_gguf
from streamline_hooks.replacements import LinearReplacement, NormedLinearReplacement
from streamline_hooks.surgery import PromptSkip
from streamline_hooks.testing import tiny_model as library_model
from tests.tiny_models import repaired, tiny_model, tokens

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    model.tie_weights()
    return model


def linear_attention(model: LlamaForCausalLM, seed: int) -> NormedLinearReplacement:
    generator, size = torch.Generator().manual_seed(seed), model.config.hidden_size
    map_ = 0.3 * torch.randn(size, size, generator=generator)
    return NormedLinearReplacement.from_map(map_, 1 + map_[0], model.config.rms_norm_eps)


def read(file: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def settings_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-3, "rope_theta": 100.0},
    ],
    ids=["grouped", "all heads", "one head", "tied", "numbers"],
)
def test_the_same_logits(changes: dict[str, Any], tmp_path: Path) -> None:
    model = llama(**changes)
    assert export_gguf(model, tmp_path / "model.gguf") == "llama"
    with torch.no_grad():
        assert torch.allclose(read(tmp_path / "model.gguf")(tokens(2, 9)).logits, model(tokens(2, 9)).logits, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    export_gguf(llama().to(dtype), tmp_path / "model.gguf")
    rounded = llama()
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(dtype))
        expected = rounded(tokens(2, 9)).logits
        assert torch.allclose(read(tmp_path / "model.gguf")(tokens(2, 9)).logits, expected, atol=1e-5)


def test_a_head_that_is_not_tied_whatever_the_settings_say(tmp_path: Path) -> None:
    model = llama()
    model.config.tie_word_embeddings = True
    export_gguf(model, tmp_path / "model.gguf")
    assert "output.weight" in {tensor.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}


def test_half_precision_that_overflows(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(StreamlineError, match=r"blk\.0\.ffn_up\.weight"):
        export_gguf(model, tmp_path / "model.gguf", dtype="f16")


def test_a_shortened_one(tmp_path: Path) -> None:
    model = llama()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1, 2])
        surgeon.commit()
    export_gguf(model, tmp_path / "model.gguf")
    loaded = read(tmp_path / "model.gguf")
    assert loaded.config.num_hidden_layers == 2
    with torch.no_grad():
        assert torch.allclose(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits, atol=1e-5)


@pytest.mark.parametrize(("dtype", "size"), [("f32", 4), ("f16", 2), ("bf16", 2)])
def test_precisions(dtype: Any, size: int, tmp_path: Path) -> None:
    model = llama()
    export_gguf(model, tmp_path / "model.gguf", dtype=dtype)
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert found["blk.0.ffn_up.weight"].n_bytes == size * 48 * 32
    assert found["blk.0.ffn_norm.weight"].n_bytes == 4 * 32
    with torch.no_grad():
        gap = (read(tmp_path / "model.gguf")(tokens(2, 9)).logits - model(tokens(2, 9)).logits).abs().max()
    assert gap < {"f32": 1e-5, "f16": 5e-2, "bf16": 3e-1}[dtype]


def test_which_weights_are_quantized(tmp_path: Path) -> None:
    """Rows of 48 weights are no multiple of 32; embeddings and LM head have 8 bits."""
    export_gguf(llama(), tmp_path / "model.gguf", dtype="q4_0")
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    kinds = {name: found[f"{name}.weight"].tensor_type.name for name in (
        "token_embd", "output", "blk.0.attn_q", "blk.0.ffn_up", "blk.0.ffn_down", "blk.0.ffn_norm", "output_norm"
    )}  # fmt: skip
    assert list(kinds.values()) == ["Q8_0", "Q8_0", "Q4_0", "Q4_0", "F16", "F32", "F32"]
    assert found["blk.0.ffn_up.weight"].n_bytes == 18 * 48 * 32 // 32
    assert settings_of(tmp_path / "model.gguf")["general.file_type"] == 2


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_quantized_weights_are_close(name: str, dtype: Any, tmp_path: Path) -> None:
    """Each of 32 weights with a scale is rounded to nearest, except at the end of the range that 4 bits lack."""
    model = library_model(name)
    for file, kind in (("exact", "f32"), ("rounded", dtype)):
        export_gguf(model, tmp_path / f"{file}.gguf", dtype=kind)
    exact, rounded = (
        {tensor.name: tensor for tensor in GGUFReader(tmp_path / f"{file}.gguf").tensors}
        for file in ("exact", "rounded")
    )
    assert list(exact) == list(rounded)
    quantized = [name for name, tensor in rounded.items() if tensor.tensor_type.name == dtype.upper()]
    assert len(quantized) > 2 * len(find_stack(model))
    for name, tensor in rounded.items():
        value = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).flatten()
        original = torch.tensor(exact[name].data).flatten()
        if tensor.tensor_type.name not in ("Q8_0", "Q4_0"):
            torch.testing.assert_close(value, original, rtol=1e-3, atol=1e-3)
            continue
        value, original = value.view(-1, 32), original.view(-1, 32)
        largest = original.abs().amax(dim=1, keepdim=True)
        step = largest / (127 if tensor.tensor_type.name == "Q8_0" else 8)
        error = (value - original).abs()
        assert (error <= 1.01 * step + largest / 1024).all(), name
        assert (error <= 0.51 * step + largest / 1024).float().mean() > 0.95, name


def test_llama_3_frequencies_are_written_as_what_divides_them(tmp_path: Path) -> None:
    model = llama(rope_parameters=LLAMA3) if hasattr(LlamaConfig(), "rope_parameters") else llama(rope_scaling=LLAMA3)
    export_gguf(model, tmp_path / "model.gguf")
    found = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    factors = torch.tensor(found["rope_freqs.weight"])
    theta = settings_of(tmp_path / "model.gguf")["llama.rope.freq_base"]
    plain = theta ** (-torch.arange(0, 8, 2) / 8)
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-5)
    assert factors[0] == 1.0 and factors[-1] == pytest.approx(8.0), "neither end is where Llama 3 has it"


def test_zeroed_attentions_are_left_out(tmp_path: Path) -> None:
    model = llama()
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(1, "attention")
        surgeon.zero_branch(2, "mlp")
        surgeon.commit()
    assert export_gguf(model, tmp_path / "small.gguf") == "deci"
    assert export_gguf(model, tmp_path / "whole.gguf", skip_zeroed_attention=False) == "llama"
    said = settings_of(tmp_path / "small.gguf")
    assert said["deci.attention.head_count"] == [4, 0, 4, 4]
    assert said["deci.attention.head_count_kv"] == [2, 0, 2, 2]
    assert said["deci.feed_forward_length"] == [48] * 4, "a length of 0 would drop that block's attention as well"
    small, whole = ({t.name for t in GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("small", "whole"))
    gone = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_norm")
    assert whole - small == {f"blk.1.{name}.weight" for name in gone}
    weights = sum(p.numel() for p in [*model.model.layers[1].self_attn.parameters()]) + 32
    saved = (tmp_path / "whole.gguf").stat().st_size - (tmp_path / "small.gguf").stat().st_size
    assert 4 * weights <= saved < 4 * weights + 1024
    with torch.no_grad():
        whole_logits = read(tmp_path / "whole.gguf")(tokens(2, 9)).logits
        assert torch.allclose(whole_logits, model(tokens(2, 9)).logits, atol=1e-5)


def test_linear_maps_in_the_place_of_attentions(tmp_path: Path) -> None:
    model = llama()
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(2, "attention")
        module = surgeon.insert(2, linear_attention(model, seed=2))
        surgeon.zero_branch(3, "attention")
        surgeon.commit()
    assert export_gguf(model, tmp_path / "model.gguf") == "deci"
    said = settings_of(tmp_path / "model.gguf")
    assert said["deci.attention.head_count"] == [4, 4, 4, 0]
    assert said["deci.attention.head_count_kv"] == [2, 2, 0, 0]
    found = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert torch.equal(found["blk.2.attn_output.weight"], module.projection.weight)
    assert torch.equal(found["blk.2.attn_norm.weight"], module.norm.weight)
    assert "blk.2.attn_q.weight" not in found and "blk.3.attn_norm.weight" not in found
    assert not [name for name in found if "splice" in name]


def test_prompts_that_skip_blocks_are_refused_beside_linear_maps(tmp_path: Path) -> None:
    model = llama()
    with LayerSurgeon(model) as surgeon:
        surgeon.zero_branch(1, "attention")
        surgeon.insert(1, linear_attention(model, seed=2))
        surgeon.commit()
    for commits in (False, True):
        with PromptSkip(model, range(2, 4), last_tokens=1) as skip:
            if commits:
                skip.commit()
            with pytest.raises(StreamlineError, match="prompts of this .* skip blocks"):
                export_gguf(model, tmp_path / "model.gguf")
    with pytest.raises(StreamlineError, match="prompts of this .* skip blocks"):
        export_gguf(model, tmp_path / "model.gguf")


def test_linear_maps_that_no_file_can_hold(tmp_path: Path) -> None:
    first, plain = llama(), llama()
    for model, k, module in ((first, 0, linear_attention(first, seed=0)), (plain, 2, LinearReplacement(32))):
        with LayerSurgeon(model) as surgeon:
            surgeon.zero_branch(k, "attention")
            surgeon.insert(k, module)
            surgeon.commit()
    with pytest.raises(StreamlineError, match=r"block 0.*llama.cpp"):
        export_gguf(first, tmp_path / "model.gguf")
    with pytest.raises(StreamlineError, match="StreamlinedLlamaForCausalLM"):
        export_gguf(plain, tmp_path / "model.gguf")


def test_the_vocabulary_of_stories(stories: tuple[nn.Module, Any], tmp_path: Path) -> None:
    """One that falls back to bytes."""
    model, tokenizer = stories
    tokenizer.save_pretrained(tmp_path)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tmp_path)
    said = settings_of(tmp_path / "model.gguf")
    assert said["tokenizer.ggml.model"] == "llama" and len(said["tokenizer.ggml.tokens"]) == model.config.vocab_size
    pieces = tokenizer.convert_ids_to_tokens(range(model.config.vocab_size))
    assert said["tokenizer.ggml.tokens"] == pieces


def merged_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """Merge the pair with the highest score first, and the leftmost of equal ones, as llama.cpp does."""
    pieces = list(text)
    while True:
        pairs = [(-scores[a + b], k) for k, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not pairs:
            return pieces
        _, k = min(pairs)
        pieces[k : k + 2] = [pieces[k] + pieces[k + 1]]


def test_scores_merge_as_the_tokenizer_does(
    stories: tuple[nn.Module, Any], story_texts: list[str], tmp_path: Path
) -> None:
    model, tokenizer = stories
    tokenizer.save_pretrained(tmp_path)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tmp_path)
    fields = settings_of(tmp_path / "model.gguf")
    normal = [kind == 1 for kind in fields["tokenizer.ggml.token_type"]]
    rows = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], normal, strict=True)
    scores = {token: score for token, score, is_normal in rows if is_normal}
    words = sorted({word for text in story_texts[:40] for word in text.split() if word.isalpha()})
    assert len(words) > 200
    for word in words:
        assert merged_by_score(f"▁{word}", scores) == tokenizer.tokenize(word)
    assert fields["tokenizer.ggml.token_type"].count(6) == 256  # bytes
    assert fields["tokenizer.ggml.add_space_prefix"] is True


def saved_tokenizer(folder: Path, **changes: Any) -> Path:
    """Save a byte-level tokenizer whose last tokens are BOS, EOS and one that is matched in the text."""
    vocabulary = {chr(41 + k): k for k in range(57)} | {"aa": 57}
    added = [
        {"id": 58, "content": "<bos>", "special": True},
        {"id": 59, "content": "<eos>", "special": True},
        {"id": 60, "content": "▁x", "special": False},
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**flags, **token} for token in added],
        "normalizer": None,
        "pre_tokenizer": byte_level(),
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "a"]]},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    return folder


def template(*names: str) -> dict[str, Any]:
    """Return a post-processor that adds tokens around a text, whose place is $A."""
    parts = [{"Sequence": {"id": "A", "type_id": 0}} if n == "$A" else {"SpecialToken": {"id": n, "type_id": 0}}
             for n in names]  # fmt: skip
    ids = {n: {"id": n, "ids": [58 if n == "<bos>" else 59], "tokens": [n]} for n in names if n != "$A"}
    return {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": ids}


@pytest.mark.parametrize(
    ("names", "bos", "eos"),
    [(("$A",), False, False), (("<bos>", "$A"), True, False), (("<bos>", "$A", "<eos>"), True, True)],
)
def test_added_tokens_are_those_of_the_tokenizer(names: tuple[str, ...], bos: bool, eos: bool, tmp_path: Path) -> None:
    """The default of llama.cpp depends on the kind of tokenizer, so both flags are always in the file."""
    folder, model = saved_tokenizer(tmp_path / "t", post_processor=template(*names)), llama()
    model.generation_config.eos_token_id = 59
    export_gguf(model, tmp_path / "model.gguf", tokenizer=folder)
    fields = settings_of(tmp_path / "model.gguf")
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (bos, eos)
    assert fields["tokenizer.ggml.bos_token_id"] == 58
    assert fields["tokenizer.ggml.token_type"][-3:] == [3, 3, 4] and fields["tokenizer.ggml.tokens"][-1] == " x"


def test_an_explicit_flag_wins(tmp_path: Path) -> None:
    folder = saved_tokenizer(tmp_path / "t", post_processor=template("<bos>", "$A"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    export_gguf(llama(), tmp_path / "model.gguf", tokenizer=folder)
    assert settings_of(tmp_path / "model.gguf")["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (59, {"eos": 59}),
        ([7, 59], {"eos": 59, "eot": 7}),
        ([7, 8, 9], {"eos": 7, "eot": 8, "eom": 9}),
        ([7, 8, 9, 10], None),
    ],
)
def test_all_tokens_that_end_a_text(ends: Any, expected: dict[str, int] | None, tmp_path: Path) -> None:
    folder, model = saved_tokenizer(tmp_path / "t"), llama()
    model.generation_config.eos_token_id = ends
    if expected is None:
        with pytest.raises(StreamlineError, match=r"4 tokens end a text.*Expected 1 to 3"):
            export_gguf(model, tmp_path / "model.gguf", tokenizer=folder)
        return
    export_gguf(model, tmp_path / "model.gguf", tokenizer=folder)
    fields = settings_of(tmp_path / "model.gguf")
    assert {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in expected} == expected


def test_without_an_end_of_text_llama_cpp_would_choose_one(tmp_path: Path) -> None:
    folder, model = saved_tokenizer(tmp_path / "t"), llama()
    (folder / "tokenizer_config.json").unlink()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(StreamlineError, match=r"0 tokens end a text"):
        export_gguf(model, tmp_path / "model.gguf", tokenizer=folder)


def test_the_first_token_may_end_a_text(tmp_path: Path) -> None:
    folder, model = saved_tokenizer(tmp_path / "t"), llama()
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].insert(0, {**content["added_tokens"][0], "id": 0, "content": ")"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"eos_token": ")"}')
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    export_gguf(model, tmp_path / "model.gguf", tokenizer=folder)
    assert settings_of(tmp_path / "model.gguf")["tokenizer.ggml.eos_token_id"] == 0


@pytest.mark.parametrize("name", ["Lowercase", "NFKC", "StripAccents"])
def test_a_normalizer_that_llama_cpp_lacks(name: str, tmp_path: Path) -> None:
    folder = saved_tokenizer(tmp_path / "t", normalizer={"type": name})
    with pytest.raises(StreamlineError, match=rf"normalizer has {name}.*Expected NFC"):
        export_gguf(llama(), tmp_path / "model.gguf", tokenizer=folder)


@pytest.mark.parametrize("size", [512 + 7, 512 - 7])
def test_a_vocabulary_of_another_size(size: int, stories: tuple[nn.Module, Any], tmp_path: Path) -> None:
    stories[1].save_pretrained(tmp_path)
    model = llama(vocab_size=size)
    if size < 512:
        with pytest.raises(StreamlineError, match=r"token 511.*505 tokens"):
            export_gguf(model, tmp_path / "model.gguf", tokenizer=tmp_path)
        return
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tmp_path)
    said = settings_of(tmp_path / "model.gguf")
    assert len(said["tokenizer.ggml.tokens"]) == len(said["tokenizer.ggml.scores"]) == size
    assert said["tokenizer.ggml.token_type"][-7:] == [5] * 7 and said["tokenizer.ggml.tokens"][-1] == "[PAD518]"


_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
_LLAMA3 = _START + r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(**changes: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **changes}


def split(pattern: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, byte_level(use_regex=False)]}


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        (byte_level(), False, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level()]}, False,
         "smollm"),
        (split(_LLAMA3), True, "llama-bpe"),
        (split(_LLAMA3.replace("{1,3}", "")), False, "qwen2"),
        (byte_level(add_prefix_space=True), False, None),
        (byte_level(use_regex=False), False, None),
        (byte_level(), True, None),
        (split(_LLAMA3), False, None),
        (split(_START + "WHATEVER"), True, None),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, byte_level()]}, False,
         None),
    ],
)  # fmt: skip
def test_how_text_is_cut(steps: dict[str, Any], ignore_merges: bool, name: str | None, tmp_path: Path) -> None:
    vocabulary = {chr(33 + k): k for k in range(61)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "ignore_merges": ignore_merges}
    content = {"model": model, "pre_tokenizer": steps, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    if name is None:
        with pytest.raises(StreamlineError, match=r"pre-tokenizer .* is unknown"):
            export_gguf(llama(), tmp_path / "model.gguf", tokenizer=tmp_path)
        return
    export_gguf(llama(), tmp_path / "model.gguf", tokenizer=tmp_path)
    assert settings_of(tmp_path / "model.gguf")["tokenizer.ggml.pre"] == name


@pytest.mark.long
@pytest.mark.slow
def test_smollm2_keeps_its_tokens_and_its_template(smollm2: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, tokenizer = smollm2
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tmp_path / "tokenizer", dtype="f16")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("Once upon a time, 12345 cats; naïve\n\n  def f(x):", "<|im_start|>user\nHi<|im_end|>"):
        assert again(text).input_ids == tokenizer(text).input_ids
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_token_id, again.bos_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: repaired("llama"), r"StreamlinedLlamaForCausalLM.*LinearReplacement"),
        (lambda: tiny_model("opt"), r"OPTForCausalLM.*causal language model of type llama, .*convert_hf_to_gguf"),
        (lambda: llama().model, r"LlamaModel.*no LM head"),
        (
            lambda: transformers.LlamaForSequenceClassification(llama().config),
            r"LlamaForSequenceClassification.*no LM head",
        ),
        (lambda: llama(attention_bias=True), r"attention_bias=True.*Expected False"),
        (lambda: llama(mlp_bias=True), "mlp_bias=True"),
        (lambda: llama(hidden_act="gelu"), r"hidden_act='gelu'.*Expected 'silu'"),
    ],
)
def test_what_it_cannot_hold_is_refused_and_nothing_is_left(make: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=said):
        export_gguf(make(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"tokenizer\.json.*missing"),
        ('{"model": {"type": "WordPiece"}}', r"WordPiece.*Expected BPE"),
        ('{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Whitespace"}}', r"Whitespace is unknown"),
    ],
)
def test_a_tokenizer_that_is_not_known(content: str | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    if content is not None:
        (tmp_path / "t" / "tokenizer.json").write_text(content)
    with pytest.raises(StreamlineError, match=said):
        export_gguf(llama(), tmp_path / "model.gguf", tokenizer=tmp_path / "t")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_an_unknown_precision(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=r"dtype='q4'.*Expected.*f32.*f16.*bf16"):
        export_gguf(llama(), tmp_path / "model.gguf", dtype="q4")
