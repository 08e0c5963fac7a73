"""Reasons why taking a block away would change more than that block."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from streamline_hooks.stack import BlockStack
from streamline_hooks.surgery.per_layer_weights import obstacle
from streamline_hooks.surgery.quantizer_names import QuantizerNames
from streamline_hooks.surgery.renumber import KEY_SHARING, same_descriptions, shortened_config


@dataclass(frozen=True)
class Hazard:
    """One reason against a surgery, in words.

    Attributes
    ----------
    cause : str
        A short name, for programs.
    text : str
        What would go wrong, naming the blocks.
    """

    cause: str
    text: str

    def __str__(self) -> str:
        return self.text


def find_hazards(stack: BlockStack, window: range) -> list[Hazard]:
    """Find what else depends on the blocks of a window, from the model and its configuration.

    Parameters
    ----------
    stack : BlockStack
    window : range
        The blocks that are to go.

    Returns
    -------
    list of Hazard
        Empty where nothing is known against it.
    """
    return [
        *find_dependents(stack, window),
        *find_numbering_hazards(stack, window.start),
        *_decoder_cache(stack, [k for k in range(len(stack)) if k not in window]),
    ]


def find_dependents(stack: BlockStack, window: range) -> list[Hazard]:
    """Find what other blocks take from those of a window, whatever number they have.

    Parameters
    ----------
    stack : BlockStack
    window : range
    """
    causes = (_shared_blocks, _shared_keys, _position_bias, _per_layer_embeddings, _derived_settings)
    return [hazard for cause in causes for hazard in cause(stack, window)]


def find_numbering_hazards(stack: BlockStack, first: int) -> list[Hazard]:
    """Find what changes when the blocks from a place on get other numbers.

    Parameters
    ----------
    stack : BlockStack
    first : int
        The first block whose number changes.
    """
    return [
        *_scale_by_number(stack, first),
        *_features_by_number(stack, first),
        *_quantized_by_number(stack, first),
    ]


def find_insertion_hazards(stack: BlockStack, k: int, slots: int) -> list[Hazard]:
    """Find what changes when another block takes a slot before block k.

    Parameters
    ----------
    stack : BlockStack
    k : int
        0 to the number of blocks.
    slots : int
        How many blocks the stack has then.
    """
    sources = [min(slot, len(stack) - 1) for slot in range(slots)]
    return [*_displaced_position_bias(stack, k), *find_numbering_hazards(stack, k), *_decoder_cache(stack, sources)]


def position_bias_owners(stack: BlockStack) -> list[int]:
    """The blocks that hold the relative position bias of all; empty where each has its own, or none has any."""
    owners = _with_position_bias(stack)
    return owners if len(owners) < len(stack) else []


def _with_position_bias(stack: BlockStack) -> list[int]:
    return [k for k, block in enumerate(stack.blocks) if any("relative_attention_bias" in n for n in _names(block))]


def _shared_blocks(stack: BlockStack, window: range) -> Iterator[Hazard]:
    """The same parameters in several blocks: what one position loses, another one still runs."""
    owners: dict[int, list[int]] = {}
    there = {id(block) for block in stack.container.children()}  # one that is gone may still hold what it handed on
    for k, block in enumerate(stack.blocks):
        for parameter in block.parameters() if id(block) in there else ():
            owners.setdefault(id(parameter), []).append(k)
    for blocks in {tuple(sorted(set(ks))) for ks in owners.values() if len(set(ks)) > 1}:
        if set(blocks) & set(window):
            listed = ", ".join(map(str, blocks))
            yield Hazard("tied-blocks", f"blocks {listed} share parameters, so that removing one frees nothing")


def _shared_keys(stack: BlockStack, window: range) -> Iterator[Hazard]:
    """The last blocks attend to keys that an earlier block produced (Gemma 3n, Gemma 4): it cannot go before them."""
    shared = getattr(stack.config, "num_kv_shared_layers", 0) or 0
    if not 0 < shared < len(stack):
        return
    first = len(stack) - shared
    kinds = getattr(stack.config, "layer_types", None) or ["attention"] * len(stack)
    for kind in sorted(set(kinds)):
        producers = [k for k in range(first) if kinds[k] == kind]
        readers = [k for k in range(first, len(stack)) if kinds[k] == kind and k not in window]
        if producers and readers and producers[-1] in window:
            span = f"{readers[0]} to {readers[-1]} share" if len(readers) > 1 else f"{readers[0]} reads"
            yield Hazard("shared-keys", f"block {producers[-1]} produces the keys that {span}")


def _position_bias(stack: BlockStack, window: range) -> Iterator[Hazard]:
    """One block alone holds the relative position bias that the model hands to the others (T5)."""
    owners = position_bias_owners(stack)
    if set(owners) & set(window):
        listed = ", ".join(map(str, owners))
        yield Hazard("position-bias", f"block {listed} owns the relative position bias that the other blocks use")


def _displaced_position_bias(stack: BlockStack, k: int) -> Iterator[Hazard]:
    """The first block computes the bias that the model hands to the others (T5): one before it would do so instead."""
    owners = position_bias_owners(stack) if len(stack) > 1 else _with_position_bias(stack)
    if owners and k <= owners[0]:
        yield Hazard(
            "position-bias",
            f"block {owners[0]} computes the relative position bias that the other blocks use, and only the first "
            "block of the stack can",
        )


def _per_layer_embeddings(stack: BlockStack, window: range) -> Iterator[Hazard]:
    """Each block reads its own slice of one large embedding, and the slices cannot be picked anew."""
    reason = obstacle(stack)
    if reason is not None:
        yield Hazard("per-layer-embeddings", reason)


def _derived_settings(stack: BlockStack, window: range) -> Iterator[Hazard]:
    """A list with one entry a block that the configuration derives from a period, and so cannot hold what is left."""
    config, count = stack.config, stack.count_attribute
    if config is None or count is None:
        return
    kept = [k for k in range(len(stack)) if k not in window]
    shorter = copy.copy(config)
    vars(shorter).update(shortened_config(config, count, len(stack), kept, stack.stage))
    # Not those that every configuration has, of which some are deprecated and say so when they are read.
    common = [base for base in type(config).__mro__ if base.__name__.lower() == "pretrainedconfig"]
    every = {name for base in common for name in vars(base)}
    for name, member in inspect.getmembers(type(config), lambda m: isinstance(m, property)):
        if name in every:
            continue
        now, then = (_value(member, c) for c in (config, shorter))
        if not isinstance(now, list) or len(now) != len(stack) or name in vars(config) or name == KEY_SHARING:
            continue
        wanted = [now[k] for k in kept]
        wrong = next((k for k, (a, b) in enumerate(zip(wanted, then or [], strict=False)) if a != b), None)
        if wrong is not None:
            yield Hazard(
                "derived-settings",
                f"{type(config).__name__} derives {name} from other settings, by which block {kept[wrong]} as number "
                f"{wrong} would be {then[wrong]!r} and not {wanted[wrong]!r}",
            )
            return


def _decoder_cache(stack: BlockStack, sources: Sequence[int]) -> Iterator[Hazard]:
    """The decoder's cache is sized by a count that is the encoder's (ProphetNet; T5 in Transformers 4)."""
    owner, count = stack.ancestors[0], stack.count_attribute
    config: Any = getattr(owner, "config", None)
    is_decoder = count in ("num_decoder_layers", "decoder_layers")
    before = getattr(config, str(count) if is_decoder else "num_decoder_layers", None)
    if not getattr(config, "is_encoder_decoder", False) or not callable(getattr(owner, "generate", None)):
        return
    if count is None or not isinstance(before, int):
        return
    after = len(sources) if is_decoder else before
    described = same_descriptions(stack)
    for one in {id(c): c for c in (config, *(described if is_decoder else ()))}.values():
        changed = copy.copy(one)
        if any(one is each for each in described):
            vars(changed).update(shortened_config(one, count, len(stack), sources, stack.stage))
        cache_before, cache_after = _cache_length(one), _cache_length(changed)
        if cache_before is not None and cache_after is not None and before <= cache_before and cache_after < after:
            yield Hazard(
                "decoder-cache",
                f"Transformers sizes the cache of the {after} decoder blocks by another count, which would be "
                f"{cache_after}",
            )
            return


def _cache_length(config: Any) -> int | None:
    """For how many blocks Transformers makes a cache; None if the cache grows."""
    from transformers import DynamicCache

    return len(DynamicCache(config=config).layers) or None


def _value(member: Any, config: Any) -> Any:
    try:
        return member.fget(config)
    except Exception:  # a property may need what this configuration has not
        return None


def _scale_by_number(stack: BlockStack, first: int) -> Iterator[Hazard]:
    """Attention that is scaled by the block's number while it runs (GPT-2 in Transformers 4): renumbering changes it.

    Later versions bake the scale into the block, which is then right in memory and is refused on commit.
    """
    scaled = [
        k
        for k, block in enumerate(stack.blocks)
        for module in block.modules()
        if getattr(module, "scale_attn_by_inverse_layer_idx", False) and not hasattr(module, "scaling")
    ]
    if any(k >= first for k in scaled):
        yield Hazard("scale-by-number", f"blocks {first} to {len(stack) - 1} scale attention by their number")


def _features_by_number(stack: BlockStack, first: int) -> Iterator[Hazard]:
    """What a vision tower's inner blocks see is added to the text's states by the number of its blocks (Qwen3-VL).

    Text alone does not show it.
    """
    takes = inspect.signature(stack.ancestors[-1].forward).parameters
    if not {"deepstack_visual_embeds", "deepstack_features"} & {*takes}:
        return
    configs = [config for module in stack.ancestors if (config := getattr(module, "config", None)) is not None]
    for config in [*configs, *(getattr(config, "vision_config", None) for config in configs)]:
        indexes = getattr(config, "deepstack_visual_indexes", None) or ()  # of the tower; in the text the first so many
        last = max([len(indexes) - 1, *(number for _, number in getattr(config, "deepstack_layer_map", None) or ())])
        if first <= last:
            yield Hazard(
                "features-by-number",
                f"what the vision tower sees is added at blocks up to {last} by their number, which would be others' "
                "then",
            )
            return


def _quantized_by_number(stack: BlockStack, first: int) -> Iterator[Hazard]:
    """Settings of a quantizer that mean blocks by a pattern of numbers, which cannot be written anew."""
    pattern = QuantizerNames(stack).pattern(first)
    if pattern is not None:
        yield Hazard(
            "quantized-by-number",
            f"the quantizer's settings mean some blocks by a pattern ({pattern}), which would mean others then: write "
            "the modules' names out instead",
        )


def _names(block: nn.Module) -> list[Any]:
    return [name for name, _ in block.named_modules()]
