"""The assertions hold for healthy models, leave them alone, and say what they cannot do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from streamline_hooks import LayerSurgeon, StreamlineError, load
from streamline_hooks.replacements import LinearReplacement
from streamline_hooks.testing import (
    assert_cached_generation_matches,
    assert_causal,
    assert_checkpoint_round_trip,
    assert_identity_preserves_output,
    assert_removal_equals_shorter_model,
    assert_restores,
    assert_shapes,
)
from streamline_hooks.testing import tiny_model as tiny_of_type
from streamline_hooks.testing.model_state import ModelState
from tests.testing.planting import swaps_two_blocks
from tests.tiny_models import FAMILIES, WIDTH, Nudge, left_padded, padded, repaired, tiny_model, tokens

OF_MODELS: dict[str, Callable[[nn.Module], None]] = {
    "identity": assert_identity_preserves_output,
    "restores": assert_restores,
    "shapes": assert_shapes,
    "causal": assert_causal,
    "cached": assert_cached_generation_matches,
    "removal": lambda model: assert_removal_equals_shorter_model(model, range(2, 4)),
    "round trip": assert_checkpoint_round_trip,
}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def encoder(tokens_first: bool = False) -> nn.TransformerEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=not tokens_first)
        return nn.TransformerEncoder(layer, 4)


def states(rows: int = 2, length: int = 6) -> Tensor:
    return torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(1))


def causal_batch() -> dict[str, Tensor]:
    return {"src": states(), "mask": nn.Transformer.generate_square_subsequent_mask(6)}


# Healthy models


IN_FLOAT32 = [(family, torch.float32) for family in FAMILIES]
IN_BFLOAT16 = [(family, torch.bfloat16) for family in ("llama", "gemma3")]  # one kind of attention, and mixed kinds


@pytest.mark.sample(12)
@pytest.mark.parametrize(("family", "dtype"), IN_FLOAT32 + IN_BFLOAT16)
@pytest.mark.parametrize("check", OF_MODELS)
def test_a_healthy_model_passes(check: str, family: str, dtype: torch.dtype) -> None:
    OF_MODELS[check](tiny_model(family, dtype))


@pytest.mark.sample(10)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", OF_MODELS)
def test_a_healthy_model_with_a_splice_passes(check: str, family: str) -> None:
    OF_MODELS[check](repaired(family))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("window", [range(0, 1), range(1, 4), range(5, 6)], ids=str)
def test_any_window_of_a_model_with_a_splice(family: str, window: range) -> None:
    length = len(repaired(family).model.layers)
    assert_removal_equals_shorter_model(repaired(family), range(window.start, min(window.stop, length)) or [length - 1])


def test_a_plain_encoder_passes() -> None:
    model = encoder()
    assert_identity_preserves_output(model, {"src": states()})
    assert_identity_preserves_output(model, states())  # a tensor alone is the first argument
    assert_restores(model, batch={"src": states()})
    assert_shapes(model, {"src": states()})
    assert_causal(model, causal_batch())
    assert_removal_equals_shorter_model(model, [1, 2], {"src": states()})


def test_the_padding_of_a_plain_encoder() -> None:
    """It looks both ways, so that no token is changed (changed_tokens=[]): only rows, and what lies in the padding."""

    class Ignoring(nn.TransformerEncoder):
        def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(src)

    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    batch = {"src": states(), "src_key_padding_mask": padding}
    assert_causal(encoder(), batch, changed_tokens=[])
    assert_identity_preserves_output(encoder(), batch)
    assert_shapes(encoder(), batch)
    with pytest.raises(AssertionError, match=r"padding was changed.*pass the attention"):
        assert_causal(Ignoring(encoder().layers[0], 3), batch, changed_tokens=[])


@dtypes
@pytest.mark.parametrize("module", [nn.Identity(), Nudge(), LinearReplacement(WIDTH)], ids=lambda m: type(m).__name__)
def test_a_healthy_replacement_passes(module: nn.Module, dtype: torch.dtype) -> None:
    module = copy.deepcopy(module).to(dtype)
    assert_shapes(module, features=WIDTH)
    assert_causal(module, features=WIDTH)


def test_a_replacement_that_says_its_width_needs_no_other_word() -> None:
    assert_shapes(LinearReplacement(WIDTH))
    assert_causal(LinearReplacement(WIDTH))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_ones_own(side: str) -> None:
    model, batch = tiny_model("llama"), padded([7, 4, 6], side)
    assert_identity_preserves_output(model, batch)
    assert_causal(model, batch)
    assert_shapes(model, batch, new_tokens=0)
    assert_removal_equals_shorter_model(model, [3], batch)
    assert_restores(model, batch=batch)
    assert_checkpoint_round_trip(model, batch=batch)


def test_generation_from_a_batch_of_ones_own_with_a_static_cache() -> None:
    assert_cached_generation_matches(tiny_model("llama"), left_padded(3, 9), steps=3, cache_implementation="static")


def test_a_folder_of_ones_own_keeps_the_checkpoint(tmp_path: Path) -> None:
    assert_checkpoint_round_trip(repaired("llama"), tmp_path / "kept")
    assert type(load(tmp_path / "kept")).__name__ == "StreamlinedLlamaForCausalLM"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "do_sample": True},
        {"stop_strings": ["a"]},
        {"eos_token_id": list(range(64))},
    ],
)
def test_the_models_own_way_of_generating_breaks_no_check(settings: dict[str, object]) -> None:
    model = tiny_model("llama")
    vars(model.generation_config).update(settings)
    assert_shapes(model)
    assert_cached_generation_matches(model, steps=3)
    assert vars(model.generation_config).items() >= settings.items()


# They leave everything as it was


@pytest.mark.parametrize("check", OF_MODELS)
def test_a_model_is_given_back_as_it_was(check: str) -> None:
    model = tiny_model("llama")
    model.train()
    model.model.layers[3].eval()
    model.model.norm.weight.requires_grad = False
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: None)
    torch.manual_seed(5)
    before, drawn = ModelState(model), torch.rand(3)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.manual_seed(5)
    OF_MODELS[check](model)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.backends.mha.get_fastpath_enabled() == fused and torch.is_grad_enabled()
    assert before.changes() == []
    handle.remove()


def test_an_encoder_is_given_back_as_it_was() -> None:
    model = encoder().train()
    before = ModelState(model)
    assert_identity_preserves_output(model, states())
    with pytest.raises(AssertionError):
        assert_causal(model, {"src": states()})
    assert before.changes() == []


def test_surgeries_are_tried_though_the_surgeon_refuses_without_a_known_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken surgery must not make the assertion try less of it."""
    tried = []
    remove = LayerSurgeon.remove

    def counting(self: LayerSurgeon, window: list[int]) -> None:
        if not self.probe:
            tried.append(list(window))
        remove(self, window)

    subject = swaps_two_blocks(monkeypatch)
    monkeypatch.setattr(LayerSurgeon, "remove", counting)
    assert_restores(subject.model)
    assert tried == [[k] for k in (0, 0, 2, 2, 3, 3)]


# What they say


def test_the_first_guilty_block_is_named() -> None:
    with pytest.raises(AssertionError) as failed:
        assert_causal(encoder(), {"src": states()})
    text = str(failed.value)
    assert "Token 1 of 6" in text and ", token 0, feature " in text
    assert "leaves block 0 (layers.0)" in text and "pass a causal mask" in text


def test_a_fault_after_the_stack_blames_no_block() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder()

        def forward(self, src: Tensor, mask: Tensor) -> Tensor:
            out: Tensor = self.encoder(src, mask=mask)
            return out + out.mean(dim=1, keepdim=True)

    with pytest.raises(AssertionError, match=r"No state of a block changed.*after the stack"):
        assert_causal(Head(), causal_batch())


def test_a_class_that_builds_blocks_from_their_number_is_no_shorter_model() -> None:
    """In memory the removal is right; only the class built from the configuration shows that it is another model."""
    with pytest.raises(AssertionError, match="shortened configuration"):
        assert_removal_equals_shorter_model(tiny_of_type("diffllama", blocks=4), [1])


def test_a_setting_that_is_only_in_the_configuration() -> None:
    model = tiny_model("llama")
    model.config.rms_norm_eps = 1e-2
    with pytest.raises(AssertionError, match=r"different logits.*absolute difference"):
        # The norms go on with what they were built with; the checkpoint comes back with what the configuration says.
        assert_checkpoint_round_trip(model)


def test_a_model_that_cannot_be_built_again_is_told_how() -> None:
    model = tiny_model("llama")
    with LayerSurgeon(model) as surgeon:
        surgeon.replace([1], Nudge())
        surgeon.commit()
    with pytest.raises(StreamlineError, match="@register_module"):
        assert_checkpoint_round_trip(model)


def test_a_change_that_alters_the_model_outside_itself_shows_in_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb

    @contextmanager
    def unrotated(model: nn.Module) -> Iterator[None]:
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *rest, **more: (q, k))
        yield

    with pytest.raises(AssertionError, match=r"different logits than before.*function of its Python module"):
        assert_restores(tiny_model("llama"), unrotated)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", original)


def test_what_the_first_forward_inside_a_change_sets_up_is_seen_only_when_it_is_run() -> None:
    @contextmanager
    def lazy(model: nn.Module) -> Iterator[None]:
        def once(module: nn.Module, args: object, kwargs: object) -> None:
            module.seen = True

        handle = model.register_forward_pre_hook(once, with_kwargs=True)
        yield
        handle.remove()

    assert_restores(tiny_model("llama"), lambda model: _closing(lazy(model)), run_inside=False)
    with pytest.raises(AssertionError, match=r"seen of the model is True;.*missing"):
        assert_restores(tiny_model("llama"), lazy)


@contextmanager
def _closing(change: object) -> Iterator[None]:
    change.__enter__()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        change.__exit__(None, None, None)  # type: ignore[attr-defined]


def test_a_model_that_keeps_the_state_of_its_last_forward_is_left_no_trace_in() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.last = encoder(), None

        def forward(self, src: Tensor) -> Tensor:
            self.last = self.encoder(src)
            return self.last

    @contextmanager
    def marking(model: nn.Module) -> Iterator[None]:
        model.encoder.marked = True
        yield

    assert_restores(Keeping(), batch={"src": states()})
    with pytest.raises(AssertionError, match=r"marked of encoder.*True;.*missing"):
        assert_restores(Keeping(), marking, {"src": states()})


def test_states_that_equal_what_would_be_drawn_are_changed_all_the_same() -> None:
    """The changed input must be another one, whatever the given one is."""

    class Bidirectional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(encoder().layers)

        def forward(self, x: Tensor) -> Tensor:
            return x + x.flip(1)

    for seed in range(3):
        drawn = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(seed))
        with pytest.raises(AssertionError, match="later tokens"):
            assert_causal(Bidirectional(), {"x": drawn})


# What they refuse


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: assert_identity_preserves_output(encoder()), r"No batch.*TransformerEncoder.*src"),
        (lambda: assert_restores(encoder()), r"No batch.*batch="),
        (lambda: assert_shapes(nn.Linear(4, 4)), r"of Linear.*features="),
        (lambda: assert_causal(nn.Linear(4, 4)), "Pass features=.*batch="),
        (lambda: assert_causal(encoder(tokens_first=True), {"src": states()}), "batch_first=True"),
        (lambda: assert_cached_generation_matches(encoder()), "no cache"),
        (lambda: assert_checkpoint_round_trip(encoder()), "has no save_pretrained"),
        (
            lambda: assert_identity_preserves_output(tiny_model("llama"), positions=[7]),
            r"7.*0 to 6.*6 blocks",
        ),
        (lambda: assert_causal(tiny_model("llama"), changed_tokens=[12]), r"contains 12.*0 to 11"),
        (
            lambda: assert_causal(tiny_model("llama"), {"input_ids": torch.full((2, 5), 7)}),
            r"All tokens.*equal",
        ),
        (lambda: assert_cached_generation_matches(tiny_model("llama"), steps=12), "steps=12.*more tokens than steps"),
        (
            lambda: assert_cached_generation_matches(tiny_model("llama"), padded([6, 3], "right"), steps=2),
            r"padded on the right.*on the left",
        ),
        (lambda: assert_removal_equals_shorter_model(tiny_model("llama"), range(4, 9)), "is not a window of the stack"),
    ],
)
def test_a_wrong_question_is_told_from_a_wrong_model(call: Callable[[], None], words: str) -> None:
    with pytest.raises(StreamlineError, match=words):
        call()


def test_a_block_alone_is_no_replacement() -> None:
    with pytest.raises(AssertionError, match="test the model"):
        assert_shapes(tiny_model("llama").model.layers[0], features=WIDTH)


def test_tolerance_is_heeded() -> None:
    class Nearly(nn.Module):
        def forward(self, state: Tensor) -> Tensor:
            return state * 1.0001

    model, batch = tiny_model("llama"), {"input_ids": tokens(2, 5)}
    with pytest.raises(AssertionError, match=r"Nearly.*block 0.*logits"):
        assert_identity_preserves_output(model, batch, identity=Nearly)
    assert_identity_preserves_output(model, batch, identity=Nearly, tolerance=1e-2)


def test_only_the_places_that_were_asked_for() -> None:
    class Counting(nn.Identity):
        made = 0

        def __init__(self) -> None:
            super().__init__()
            Counting.made += 1

    batch = {"input_ids": tokens(2, 5)}
    assert_identity_preserves_output(tiny_model("llama"), batch, identity=Counting, positions=[0, 6])
    assert Counting.made == 2
