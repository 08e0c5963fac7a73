"""Faults that are planted for real, and which assertion sees which: python -m tests.testing.planted_faults

The command writes docs/planted_faults.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from streamline_hooks.testing import (
    assert_cached_generation_matches,
    assert_causal,
    assert_checkpoint_round_trip,
    assert_identity_preserves_output,
    assert_recording_is_faithful,
    assert_removal_equals_shorter_model,
    assert_restores,
    assert_shapes,
)
from tests.testing.planting import (
    BLOCKS,
    Patch,
    Subject,
    a_table_in_memory,
    changed,
    changes_by,
    changes_what_it_records,
    count_not_put_back,
    counts_the_padding,
    doubles_the_gradients,
    equal_copy,
    ignores_the_mask,
    in_half_precision,
    inserts_something_else,
    leaves,
    leaves_a_hook_everywhere,
    loses_the_repair,
    never_renumbers,
    never_shortens_the_config,
    nothing,
    nudged,
    off_by_one_slot,
    one_block_early,
    one_block_less,
    one_token_late,
    only_when_all_goes_well,
    other_frequencies,
    patches_nothing,
    plain,
    reordered,
    repaired,
    replaced_by,
    setting,
    swallowing,
    swaps_two_blocks,
    turns_the_mask_round,
    with_a_plain_tensor,
    with_forward,
    with_gradients,
    writes,
)
from tests.testing.wrong_replacements import (
    WIDTH,
    Bidirectional,
    DividesByZero,
    MeanOverEarlierTokens,
    MeanOverTokens,
    MixesRows,
    Squeezes,
    StaysInFloat32,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planted_faults.md"


@dataclass(frozen=True)
class Fault:
    """A fault, how it is planted, which assertion must see it, and a pattern of what that must say."""

    name: str
    plant: Callable[[Patch], Subject]
    caught_by: str
    says: str


CHECKS: dict[str, Callable[[Subject], object]] = {
    "identity": lambda s: assert_identity_preserves_output(s.model),
    "recording": lambda s: assert_recording_is_faithful(s.model, blocks=[0, -1]),
    "restores": lambda s: assert_restores(s.model, s.change),
    "shapes": lambda s: assert_shapes(s.model),
    "shapes, module": lambda s: assert_shapes(s.module, features=WIDTH) if s.module else None,
    "causal": lambda s: assert_causal(s.model),
    "causal, module": lambda s: assert_causal(s.module, features=WIDTH) if s.module else None,
    "cached generation": lambda s: assert_cached_generation_matches(s.model, steps=3),
    "removal": lambda s: assert_removal_equals_shorter_model(s.model, range(1, 2)),
    "round trip": lambda s: assert_checkpoint_round_trip(s.model),
}
HEALTHY: dict[str, Callable[[Patch], Subject]] = {
    "no fault, Llama": lambda patch: plain(),
    "no fault, GPT-2": lambda patch: plain("gpt2"),
    "no fault, Llama with a replacement": repaired,
}


_LLAMA, _GPT2 = transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel
_TWO, _WEIGHT = "model.layers.2", "model.layers.2.mlp.up_proj.weight"
FAULTS = (
    Fault(
        "the surgery leaves a forward hook",
        leaves(lambda model: model.model.layers[2].register_forward_hook(nothing)),
        "restores",
        "a forward hook was left on model.layers.2: nothing",
    ),
    Fault(
        "the surgery leaves a forward pre-hook",
        leaves(lambda model: model.model.layers[1].self_attn.register_forward_pre_hook(nothing)),
        "restores",
        "a forward pre-hook was left on model.layers.1.self_attn",
    ),
    Fault(
        "the surgery leaves a state-dict hook",
        leaves(lambda model: model.register_state_dict_pre_hook(nothing)),
        "restores",
        "a state-dict pre-hook was left on the model",
    ),
    Fault(
        "the surgery leaves a global module hook",
        leaves_a_hook_everywhere,
        "restores",
        "a forward hook was left on all modules of this process",
    ),
    Fault(
        "the surgery leaves a gradient hook",
        leaves(lambda model: model.get_parameter(_WEIGHT).register_hook(nothing)),
        "restores",
        f"a gradient hook was left on {_WEIGHT}: nothing",
    ),
    Fault(
        "the surgery leaves a post-accumulate-grad hook",
        leaves(lambda model: model.get_parameter(_WEIGHT).register_post_accumulate_grad_hook(nothing)),
        "restores",
        f"a post-accumulate-grad hook was left on {_WEIGHT}: nothing",
    ),
    Fault(
        "the gradients are doubled in place",
        leaves(doubles_the_gradients, with_gradients),
        "restores",
        "the gradient of model.embed_tokens.weight has different values",
    ),
    Fault(
        "a tensor that is neither parameter nor buffer is changed in place",
        leaves(lambda model: model.model.norm.scale.mul_(2), with_a_plain_tensor),
        "restores",
        "scale of model.norm is a tensor with",
    ),
    Fault(
        "a layer index is not restored",
        leaves(setting("model.layers.3.self_attn", "layer_idx", 2)),
        "restores",
        "layer_idx of model.layers.3.self_attn is 2; it was 3",
    ),
    Fault(
        "the number of layers in the configuration is not restored",
        leaves(count_not_put_back),
        "restores",
        "config.num_hidden_layers of the model is 3; it was 4",
    ),
    Fault(
        "a parameter is restored as an equal copy",
        leaves(equal_copy),
        "restores",
        "model.layers.0.self_attn.q_proj.weight is a different Parameter",
    ),
    Fault(
        "a parameter is changed by 1e-3",
        leaves(nudged),
        "restores",
        r"model.layers.1.mlp.up_proj.weight has different values.*0\.001",
    ),
    Fault(
        "a parameter stays frozen",
        leaves(lambda model: model.model.norm.weight.requires_grad_(False)),
        "restores",
        "requires_grad of model.norm.weight is False; it was True",
    ),
    Fault(
        "a block stays in training mode",
        leaves(lambda model: model.model.layers[2].train()),
        "restores",
        "training of model.layers.2 is True; it was False",
    ),
    Fault(
        "the order of the state-dict keys is not restored",
        leaves(reordered),
        "restores",
        "different order: key 1",
    ),
    Fault(
        "a context manager swallows exceptions",
        changes_by(swallowing),
        "restores",
        r"swallowing.*does not propagate",
    ),
    Fault(
        "a context manager restores only without an exception",
        changes_by(only_when_all_goes_well),
        "restores",
        r"only_when_all_goes_well.*not as before: a forward hook",
    ),
    Fault(
        "the surgery swaps two blocks",
        swaps_two_blocks,
        "removal",
        r"LlamaForCausalLM without block 1.*different logits",
    ),
    Fault(
        "the surgery does not renumber the blocks",
        never_renumbers,
        "removal",
        r"layer_idx of block 1 \(self_attn\) is 2; expected 1",
    ),
    Fault(
        "the surgery does not shorten the configuration",
        never_shortens_the_config,
        "removal",
        "cannot be built from the shortened configuration",
    ),
    Fault(
        "an identity multiplies by 1 + 1e-6",
        inserts_something_else,
        "identity",
        r"AlmostIdentity.*block 0.*logits",
    ),
    Fault(
        "recordings are off by one token",
        one_token_late,
        "recording",
        r"Replaying the recorded block\.input changes the output of LlamaForCausalLM",
    ),
    Fault(
        "recordings are off by one block",
        one_block_early,
        "recording",
        r"Replaying the recorded block\.input changes the output",
    ),
    Fault(
        "recording doubles what an MLP adds",
        changes_what_it_records,
        "recording",
        r"Recording mlp\.output changes the output",
    ),
    Fault(
        "a patch does nothing",
        patches_nothing,
        "recording",
        r"Exchanging the rows and tokens of block\.input of block 0 does not change the output",
    ),
    Fault(
        "a replacement attends bidirectionally",
        replaced_by(Bidirectional),
        "causal",
        r"first state to change.*enters block 1 \(model\.layers\.1\)",
    ),
    Fault(
        "a replacement averages over all tokens",
        replaced_by(MeanOverTokens),
        "causal, module",
        r"MeanOverTokens uses later tokens.*causal mask",
    ),
    Fault(
        "a replacement averages over earlier tokens",
        replaced_by(MeanOverEarlierTokens),
        "cached generation",
        "module between the blocks uses other tokens",
    ),
    Fault(
        "a replacement mixes the rows of a batch",
        replaced_by(MixesRows),
        "causal, module",
        r"MixesRows.*another row",
    ),
    Fault(
        "a replacement squeezes the axis of a single token",
        replaced_by(Squeezes),
        "shapes, module",
        r"Squeezes.*\(1, 32\).*\(1, 1, 32\)",
    ),
    Fault(
        "a replacement returns float32 for bfloat16 input",
        replaced_by(StaysInFloat32),
        "shapes, module",
        r"StaysInFloat32.*torch\.float32.*torch\.bfloat16",
    ),
    Fault(
        "a replacement divides by zero at the first token",
        replaced_by(DividesByZero),
        "shapes, module",
        r"DividesByZero.*1 x 1 tokens.*torch\.float32.*NaN.*batch 0, token 0",
    ),
    Fault(
        "a block attends to later tokens",
        changed(setting(f"{_TWO}.self_attn", "is_causal", False)),
        "causal",
        r"first state to change.*leaves block 2 \(model\.layers\.2\)",
    ),
    Fault(
        "the attention mask is ignored",
        with_forward("llama", _LLAMA, ignores_the_mask),
        "cached generation",
        r"Row 1.*left-padded.*different logits",
    ),
    Fault(
        "the attention mask is inverted",
        with_forward("llama", _LLAMA, turns_the_mask_round),
        "cached generation",
        "attention mask is ignored or inverted",
    ),
    Fault(
        "position ids count the padding",
        with_forward("gpt2", _GPT2, counts_the_padding),
        "cached generation",
        r"positions count the padding.*attention_mask",
    ),
    Fault(
        "two blocks share a cache slot",
        changed(setting(f"{_TWO}.self_attn", "layer_idx", 3)),
        "cached generation",
        r"layer_idx of block 2 \(model\.layers\.2\.self_attn\) is 3.*slot of another block",
    ),
    Fault(
        "all blocks are off by one cache slot",
        changed(off_by_one_slot),
        "cached generation",
        r"layer_idx of block 0 \(model\.layers\.0\.self_attn\) is 1",
    ),
    Fault(
        "a non-persistent buffer is changed",
        changed(other_frequencies),
        "round trip",
        r"buffer model\.rotary_emb\.inv_freq.*not saved",
    ),
    Fault(
        "an integer table is not saved",
        changed(a_table_in_memory),
        "round trip",
        r"buffer model\.table.*not saved: missing",
    ),
    Fault("loading loses the replacement", loses_the_repair, "round trip", "spliced_before.*not be the saved one"),
    Fault(
        "the checkpoint has one block too few",
        writes(one_block_less),
        "round trip",
        "different number or kind of blocks",
    ),
    Fault(
        "the checkpoint has another dtype",
        writes(in_half_precision),
        "round trip",
        "in torch.float16; expected torch.float32",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What a check said of a subject: "" for nothing, "caught", or "stopped" by an error that is no assertion's."""

    verdict: str
    text: str = ""


def outcomes(plant: Callable[[Patch], Subject]) -> dict[str, Outcome]:
    """Plant a fault anew for each check that applies, and run it."""
    found: dict[str, Outcome] = {}
    for name, check in CHECKS.items():
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject = plant(patch)
            if name.endswith("module") and subject.module is None:
                continue
            try:
                check(subject)
            except AssertionError as error:
                found[name] = Outcome("caught", str(error))
            except Exception as error:
                found[name] = Outcome("stopped", f"{type(error).__name__}: {error}")
            else:
                found[name] = Outcome("")
    return found


_SIGNS = {"caught": "●", "stopped": "!", "": "·"}


def line(name: str, found: dict[str, Outcome]) -> str:
    """A row of the page."""
    cells = [_SIGNS[found[check].verdict] if check in found else "" for check in CHECKS]
    return f"| {name} | {' | '.join(cells)} |"


def page() -> str:
    """The whole page, found out anew."""
    rows = [line(name, outcomes(plant)) for name, plant in HEALTHY.items()]
    rows += [line(fault.name, outcomes(fault.plant)) for fault in FAULTS]
    return "\n".join(
        [
            "# Planted faults",
            "",
            "Each row is a fault that is planted in a tiny model, its surgery, its replacement or its checkpoint. Each "
            "column is an assertion of `streamline_hooks.testing`, run on the faulty model.",
            "",
            f"Models: {BLOCKS} blocks, random weights, with Transformers {transformers.__version__}: {len(FAULTS)} "
            "faults. Written by `python -m tests.testing.planted_faults`.",
            "",
            "● the assertion fails; ! the assertion is stopped by another error, whose message names the fault; · the "
            "assertion passes; an empty cell: the assertion does not apply.",
            "",
            f"| fault | {' | '.join(CHECKS)} |",
            f"|---|{'---|' * len(CHECKS)}",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    PAGE.write_text(page())
    print(f"{len(FAULTS)} faults; written to {PAGE}")


if __name__ == "__main__":
    main()
