"""How much channels are needed, measured on text, and the kind that is made of those needed most."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamline_hooks import (
    LayerSurgeon,
    StreamlineError,
    UnsupportedSurgery,
    find_stack,
    fit_windows,
    load,
    place,
    save,
)
from streamline_hooks.cli.short_forms import parse_replacement
from streamline_hooks.repair import MergedConfig, needed_channels
from streamline_hooks.repair.needed_channels import measure_needs
from streamline_hooks.replacements.concatenated import Channels
from tests.repair.stand_ins import FIT, HELD_OUT, error
from tests.tiny_models import left_padded, tiny_model, tokens

WINDOW = range(2, 5)


def test_needs_are_what_a_channel_adds_to_real_tokens() -> None:
    model: Any = tiny_model("llama")
    stack, batch = find_stack(model), left_padded(4, 16)
    mlp = Channels("mlp", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", 48)
    heads = Channels("attention", ("self_attn.q_proj",), "self_attn.o_proj", 2)
    needs = measure_needs(stack, {(3, "mlp"): mlp, (1, "attention"): heads}, [batch, tokens(2, 5)])
    received: dict[str, list[torch.Tensor]] = {"mlp": [], "attention": []}
    layers = model.model.layers
    handles = [
        layers[3].mlp.down_proj.register_forward_pre_hook(lambda module, args: received["mlp"].append(args[0])),
        layers[1].self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: received["attention"].append(args[0])
        ),
    ]
    with torch.no_grad():
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(row[mask.bool()][None])  # each sequence alone, without its padding
        model(tokens(2, 5))
    for handle in handles:
        handle.remove()
    a = torch.cat([one.flatten(0, 1) for one in received["mlp"]]).double()
    wanted = a.norm(dim=0) * layers[3].mlp.down_proj.weight.double().norm(dim=0)
    torch.testing.assert_close(needs[3, "mlp"], wanted, rtol=1e-4, atol=1e-6)
    a = torch.cat([one.flatten(0, 1) for one in received["attention"]]).double()
    squares = (a.norm(dim=0) * layers[1].self_attn.o_proj.weight.double().norm(dim=0)).square()
    torch.testing.assert_close(needs[1, "attention"], squares.view(2, 16).sum(dim=1).sqrt(), rtol=1e-4, atol=1e-6)


def test_a_channel_that_does_nothing_is_left_out(tmp_path: Any) -> None:
    """Of a window whose first MLP adds nothing all channels are the others'; the checkpoint is a plain one."""
    model: Any = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data.zero_()
    (repair,) = fit_windows(model, [WINDOW], MergedConfig(channels="mlp"), FIT, HELD_OUT)
    stand_in: Any = repair.stand_in
    assert bool((stand_in.mlp.down_proj.weight != 0).any(dim=0).all())
    assert repair.repaired_error == pytest.approx(error(model, WINDOW, stand_in, HELD_OUT), rel=1e-4)
    with LayerSurgeon(model) as surgeon:
        place(surgeon, WINDOW, stand_in)
        surgeon.commit()
    loaded = load(save(model, tmp_path / "model"), as_original=True)
    assert torch.equal(loaded(tokens(2, 6)).logits, model(tokens(2, 6)).logits)


@pytest.mark.parametrize("channels", ["mlp", "attention", "both"])
def test_least_squares_comes_after_the_merge(channels: str) -> None:
    model = tiny_model("gpt2")
    plain, solved = (
        fit_windows(
            model, [range(0, 2), WINDOW], parse_replacement(f"merged:channels={channels}{solve}"), FIT, HELD_OUT
        )
        for solve in ("", ",solve")
    )
    for before, after in zip(plain, solved, strict=True):
        assert after.repaired_error < before.repaired_error and after.ridge is not None and before.ridge is None
        one, other = (repair.stand_in.state_dict() for repair in (before, after))  # type: ignore[union-attr]
        changed = {name for name in one if not torch.equal(one[name], other[name])}
        assert changed == {"mlp.c_proj.weight", "mlp.c_proj.bias"}


def test_a_window_that_cannot_be_merged_leaves_the_others() -> None:
    from streamline_hooks.batch import batches_of
    from streamline_hooks.selection.search import Selection, verified

    model: Any = tiny_model("llama")
    model.model.layers[5].mlp = torch.nn.Identity()
    selections = [Selection((window,)) for window in (range(0, 2), range(4, 6))]
    parts = (batches_of(tokens(4, 12, seed=seed), 2) for seed in range(3))
    first, second = verified(model, selections, *parts, replacement=MergedConfig(channels="mlp"))
    assert not first.refused and first.windows == (range(0, 2),)
    assert "usual two residual branches" in second.refused


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("merged:channels=all", r"channels='all'.*attention, mlp or both"),
        ("merged:channels=mlp,weight=0.5", r"channels='mlp'.*weight=0\.5.*Change"),
    ],
)
def test_options_that_say_nothing_together(kind: str, said: str) -> None:
    with pytest.raises(StreamlineError, match=said):
        fit_windows(tiny_model("llama"), [WINDOW], parse_replacement(kind), FIT, HELD_OUT)


def test_the_error_names_what_can_be_done_before_any_text_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only the last blocks of a window differ, and there are fewer heads with keys than blocks."""
    monkeypatch.setattr(needed_channels, "measure_needs", None)
    model: Any = tiny_model("llama")
    model.model.layers[5].self_attn.scaling = 2.0
    with pytest.raises(UnsupportedSurgery, match=r"differ in self_attn\.scaling"):
        fit_windows(model, [range(2, 6)], MergedConfig(channels="attention"), FIT, HELD_OUT)
    with pytest.raises(UnsupportedSurgery, match=r"Choose.*merged:channels=mlp"):
        fit_windows(tiny_model("qwen3"), [WINDOW], MergedConfig(channels="both"), FIT, HELD_OUT)
