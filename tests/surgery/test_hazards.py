"""What else depends on a block is named before it goes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration

from streamline_hooks import LayerSurgeon, StreamlineError, UnsupportedSurgery, find_stack
from streamline_hooks.surgery import bypassing
from streamline_hooks.surgery.verify import trace_forward
from streamline_hooks.testing import causal_model_types
from streamline_hooks.testing import tiny_model as tiny_of_type
from streamline_hooks.testing.model_state import ModelState
from tests.other_models import PATCHED, qwen3_vl


def test_producers_of_shared_keys_stay_and_their_readers_may_go() -> None:
    model = tiny_of_type("gemma3n_text")
    producers, keeping = _producers(model), _keeping(model)
    assert keeping
    with LayerSurgeon(model) as surgeon:
        for k in range(8):
            assert (k in producers) == ("shared-keys" in [h.cause for h in surgeon.check([k])])
        with pytest.raises(UnsupportedSurgery, match=r"block 5.*6 to 7 share"):
            surgeon.remove([5])
        assert surgeon.check(range(6, 8)) == []  # nobody is left who reads what 4 and 5 keep
        surgeon.remove(range(6, 8))
        if hasattr(model.config, "kv_sharing_modes"):  # Transformers 4 keeps them in any case
            assert not _keeping(model)
    assert _keeping(model) == keeping


def test_the_producer_of_keys_that_one_block_reads_stays() -> None:
    model = tiny_of_type("gemma3n_text", num_kv_shared_layers=1)
    with LayerSurgeon(model) as surgeon:
        (producer,) = {max(k for k in range(7) if model.config.layer_types[k] == model.config.layer_types[7])}
        (hazard,) = surgeon.check([producer])
        assert hazard.cause == "shared-keys" and f"block {producer} produces the keys that 7 reads" in hazard.text
        assert surgeon.check([7]) == []
        assert {hazard, *surgeon.check([producer])} == {hazard}, "the same one, which is in a set once"


@pytest.mark.skipif("glm_moe_dsa" not in causal_model_types(), reason="this Transformers has no GLM with DSA")
def test_a_block_that_chooses_the_tokens_for_the_next_blocks_stays() -> None:
    """Inputs with at most index_topk tokens, such as those of a probe, do not show the difference."""
    kinds = ["full", "shared", "shared", "shared", "full", "shared", "full", "full"]
    model = tiny_of_type("glm_moe_dsa", blocks=8, index_topk=4, indexer_types=kinds)
    with LayerSurgeon(model) as surgeon:
        choosing = [k for k in range(8) if "shared-choices" in [h.cause for h in surgeon.check([k])]]
        assert choosing == [0, 4]
        with pytest.raises(UnsupportedSurgery, match="block 0 chooses the tokens to which blocks 1 to 3 attend"):
            surgeon.remove([0])
        (hazard,) = surgeon.check(range(3, 5))
        assert hazard.text == "block 4 chooses the tokens to which block 5 attends"
        assert surgeon.check(range(4, 6)) == surgeon.check([2]) == []
        ids = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            with bypassing(model, range(4, 6)):
                expected = model(ids).logits
            surgeon.remove(range(4, 6))
            torch.testing.assert_close(model(ids).logits, expected)


def _keeping(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "store_full_length_kv", False)]


def _producers(model: torch.nn.Module) -> set[int]:
    types, first = model.config.layer_types, 8 - model.config.num_kv_shared_layers
    return {max(k for k in range(first) if types[k] == kind) for kind in set(types[first:])}


@pytest.mark.parametrize("window", [range(0, 1), range(2, 4), range(6, 8)])
def test_each_block_keeps_its_own_slice_of_the_per_layer_embeddings(window: range) -> None:
    model = tiny_of_type("gemma3n_text")
    owner, width = model.model, model.config.hidden_size_per_layer_input
    embedding, projection = owner.embed_tokens_per_layer.weight, owner.per_layer_model_projection.weight
    kept = [k for k in range(8) if k not in window]
    with LayerSurgeon(model) as surgeon:
        surgeon.remove(window)
        for slot, k in enumerate(kept):
            new, old = (slice(n * width, (n + 1) * width) for n in (slot, k))
            assert torch.equal(owner.embed_tokens_per_layer.weight[:, new], embedding[:, old])
            assert torch.equal(owner.per_layer_model_projection.weight[new], projection[old])
        assert owner.embed_tokens_per_layer.embedding_dim == width * len(kept)
    assert owner.embed_tokens_per_layer.weight is embedding and owner.per_layer_model_projection.weight is projection
    assert owner.embed_tokens_per_layer.embedding_dim == width * 8


@pytest.mark.skipif(not hasattr(transformers, "Qwen3VLConfig"), reason="this Transformers has no Qwen3-VL")
def test_what_is_seen_and_added_behind_the_first_blocks_of_a_text_keeps_them_in_their_places() -> None:
    """Text alone does not tell: the probe calls the text's blocks without an image."""
    torch.manual_seed(0)
    model: Any = qwen3_vl().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    path = "model.language_model.layers"
    stack = find_stack(model, path)

    def said() -> torch.Tensor:
        with torch.no_grad():
            return model(**PATCHED).logits

    for k in range(4):
        hook = stack[k].register_forward_hook(lambda block, args, output: args[0])
        bypassed = said()
        hook.remove()
        with LayerSurgeon(model, path) as surgeon:
            causes = [hazard.cause for hazard in surgeon.check([k])]
            surgeon.remove([k], despite_hazards=True)
            right = torch.allclose(said(), bypassed, atol=1e-4)
        assert (causes == []) == right == (k >= 2) and set(causes) <= {"features-by-index"}
    with LayerSurgeon(model, path) as surgeon:
        with pytest.raises(UnsupportedSurgery, match="blocks up to 1 by index"):
            surgeon.insert(1, copy.deepcopy(stack[3]))
        surgeon.insert(1, torch.nn.Identity())  # which takes no number
        surgeon.exchange(0, copy.deepcopy(stack[0]))
    model.config.vision_config.deepstack_visual_indexes = [0, 1, 2]
    with LayerSurgeon(model, path) as surgeon:
        (hazard,) = surgeon.check([2])
        assert hazard.cause == "features-by-index" and "blocks up to 2" in hazard.text


def test_per_layer_embeddings_that_cannot_be_picked_are_named() -> None:
    model = tiny_of_type("gemma3n_text")
    weight = model.model.embed_tokens_per_layer.weight
    model.model.embed_tokens_per_layer.weight = torch.nn.Parameter(weight.to("meta"))
    with LayerSurgeon(model) as surgeon:
        assert [h.cause for h in surgeon.check([0])] == ["per-layer-embeddings"]
        with pytest.raises(UnsupportedSurgery, match="each of its 8 blocks"):
            surgeon.remove([0])


CAUSES = [
    # type, block, cause, words
    ("beam", 4, "computes-with-index", "(attn_residual_add_idx, mlp_residual_add_idx)"),
    ("dory", 4, "looped-blocks", "blocks 2 to 5 up to 2 times"),
    ("xlm", 4, "split-blocks", "(attentions, layer_norm1, layer_norm2 and ffns)"),
    ("zaya", 4, "extra-state", "block 4 passes more than the hidden state"),
    ("reformer", 7, "extra-state", "passes more than the hidden state"),
    ("inkling2_text", 4, "attributes-read-outside", "is_block_boundary (True on block 4)"),
    ("rwkv", 4, "absolute-indices", "(rescale_every)"),
    ("jamba", 4, "derived-settings", "block 6, renumbered to 5"),
    ("minimax", 0, "cache", "decoding with a cache"),
    ("mllama", 3, "cannot-run", "input_ids alone"),
    ("zamba2", 2, "tied-blocks", "blocks 2, 5 share parameters"),
    ("diffllama", 0, "built-from-index", "self_attn.lambda_init is"),
    ("modernbert-decoder", 0, "built-from-index", "model.layers.0.attn_norm.weight has the shape"),
    ("gemma4_unified_text", 7, "configuration", "turns layer_types[6] from 'sliding_attention' into 'full_attention'"),
]


@pytest.mark.parametrize(("model_type", "block", "cause", "words"), CAUSES, ids=[case[0] for case in CAUSES])
def test_hazards_are_known_by_their_cause(model_type: str, block: int, cause: str, words: str) -> None:
    if model_type not in causal_model_types():
        pytest.skip(f"this Transformers has no {model_type}")
    model = tiny_of_type(model_type)
    model(torch.arange(6)[None])  # RWKV rescales its weights when it is first used
    before = ModelState(model)
    with LayerSurgeon(model) as surgeon:
        found = surgeon.check([block])
        assert [h.cause for h in found] == [cause]
        assert words in found[0].text
        if cause in ("built-from-index", "configuration"):
            surgeon.remove([block])  # in memory it is right
            with pytest.raises(UnsupportedSurgery) as refused:
                surgeon.commit()
            assert refused.value.cause == cause
        else:
            for module in (None, torch.nn.Identity()):
                with pytest.raises(UnsupportedSurgery, match="cannot be removed: ") as refused:
                    surgeon.replace([block], module)
                assert refused.value.cause == cause
    assert not before.changes()


class _ScaledByNumber(torch.nn.Module):
    """Divides by its number while it runs, as GPT-2's attention does in Transformers 4."""

    scale_attn_by_inverse_layer_idx = True

    def __init__(self, number: int) -> None:
        super().__init__()
        self.inner, self.layer_idx = torch.nn.Linear(8, 8), number

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state + self.inner(state) / (self.layer_idx + 1)


def test_blocks_that_scale_by_their_number_while_they_run_are_named() -> None:
    model = torch.nn.Sequential(torch.nn.Sequential(*(_ScaledByNumber(k) for k in range(5))))
    with LayerSurgeon(model) as surgeon:
        (hazard,) = surgeon.check([2])
        assert hazard.cause == "scale-by-index" and "in blocks 2 to 4" in hazard.text
        with pytest.raises(UnsupportedSurgery, match="in blocks 1 to 4"):
            surgeon.insert(1, copy.deepcopy(model[0][3]))


class _DescribedBlock(torch.nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.inner, self.kind, self.factor, self._hint = torch.nn.Linear(8, 8), ("even", "odd")[number % 2], 0.5, number

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state + self.inner(state)


class _ReadingModel(torch.nn.Module):
    """Reads attributes of its blocks while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(_DescribedBlock(number) for number in range(4))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            assert block.kind and block.inner and block.training and block._hint >= 0
            state = block(state) * block.factor
        return state


def test_only_public_numbers_that_the_model_reads_from_its_blocks_are_recorded() -> None:
    """A model may read the kind of a block, its modules and its private attributes."""
    model = _ReadingModel()
    trace = trace_forward(find_stack(model), lambda: model(torch.ones(2, 3, 8)))
    assert trace.read == {number: {"factor": 0.5} for number in range(4)}


def test_watching_a_forward_leaves_no_trace() -> None:
    model = tiny_of_type("inkling2_text" if "inkling2_text" in causal_model_types() else "llama")
    before = ModelState(model)
    stack = find_stack(model)
    seen = trace_forward(stack, lambda: model(torch.arange(6)[None]))
    assert seen.visits == dict.fromkeys(range(8), 1) and not before.changes()
    with pytest.raises(RuntimeError, match="stop"):
        trace_forward(stack, lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    assert not before.changes()


def _tiny_t5() -> T5ForConditionalGeneration:
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=4, num_decoder_layers=4, num_heads=4)
    return T5ForConditionalGeneration(config)


def test_the_owner_of_the_position_bias() -> None:
    model = _tiny_t5()
    with LayerSurgeon(model, stack="encoder.block") as surgeon:
        with pytest.raises(UnsupportedSurgery, match="block 0 owns the relative position bias"):
            surgeon.remove([0])
        by_encoder = ["decoder-cache"] if transformers.__version__ < "5" else []  # by what the cache is sized
        assert [hazard.cause for hazard in surgeon.check([1, 2])] == by_encoder


def test_wrapped_models_are_refused(tmp_path: object) -> None:
    from torch.distributed import destroy_process_group, init_process_group

    model = tiny_of_type("llama")
    init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.raises(StreamlineError, match=r"DistributedDataParallel already.*then wrap"):
            LayerSurgeon(wrapped).__enter__()
    finally:
        destroy_process_group()
    with LayerSurgeon(model) as surgeon:
        surgeon.remove([1])


@pytest.mark.skipif("zaya" not in causal_model_types(), reason="this Transformers has no Zaya")
def test_a_model_without_a_head_is_probed_too() -> None:
    with LayerSurgeon(tiny_of_type("zaya").model) as surgeon:
        with pytest.raises(UnsupportedSurgery, match="other logits than the bypassed model|the model fails"):
            surgeon.remove([4])


def test_a_model_that_cannot_be_probed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_of_type("llama")

    def refuse(**given: object) -> None:
        raise ValueError("pixels are missing")

    monkeypatch.setattr(model, "forward", refuse)
    with LayerSurgeon(model) as surgeon, pytest.warns(UserWarning, match=r"not compared with.*ValueError: pixels are"):
        surgeon.remove([1])


@pytest.mark.parametrize("path", ["encoder.block", "decoder.block"])
def test_no_block_takes_the_slot_before_the_one_that_computes_the_position_bias(path: str) -> None:
    """Even one that adds nothing would change the logits: the other blocks would get its bias, which is zero."""
    model = _tiny_t5()
    before = ModelState(model)
    with LayerSurgeon(model, stack=path) as surgeon:
        block = copy.deepcopy(surgeon.stack[1])
        with pytest.raises(UnsupportedSurgery, match=r"block 0.*despite_hazards=True"):
            surgeon.insert(0, block)
        surgeon.insert(0, torch.nn.Identity())  # takes no slot
        longer = path == "decoder.block" and transformers.__version__ < "5"  # than its cache would be
        surgeon.insert(1, block, despite_hazards=longer)
        assert [slot.source for slot in surgeon.plan.slots][:2] == [0, None]
    assert before.changes() == []


def test_no_block_takes_the_slot_before_the_only_one_that_computes_the_position_bias() -> None:
    """Not even a copy of it: trained apart, its bias would be that of both."""
    model = _tiny_t5()
    with LayerSurgeon(model, stack="encoder.block", probe=False) as surgeon:
        other = copy.deepcopy(surgeon.stack[1])
        surgeon.remove(range(1, 4), despite_hazards=True)
        with LayerSurgeon(model, stack="encoder.block") as inner:
            for block in (other, copy.deepcopy(inner.stack[0])):
                with pytest.raises(UnsupportedSurgery, match=r"block 0.*despite_hazards=True"):
                    inner.insert(0, block)
