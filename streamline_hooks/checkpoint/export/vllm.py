"""Serve checkpoints with splices in vLLM, through its backend for models of Transformers.

vLLM calls `register` in each of its processes if this library is installed (entry point ``vllm.general_plugins``), and
imports the class of the models by its name. Plain checkpoints need no plugin.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from streamline_hooks.core import StreamlineError
from streamline_hooks.surgery import base_class, is_splice_parameter, register_classes

_NAME = "SplicedForCausalLM"


def register() -> None:
    """Register the classes of causal language models with splices in vLLM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    for name in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())):
        ModelRegistry.register_model(f"Streamlined{name}", f"{__name__}:{_NAME}")


@functools.cache
def _model_class() -> type[Any]:
    """Return the class with which vLLM runs models with splices.

    vLLM builds the model from its configuration, which inserts the splices, and replaces the modules inside blocks by
    its own. The hooks of the blocks run the splices.
    """
    from vllm.model_executor.models.transformers import TransformersForCausalLM

    class SplicedForCausalLM(TransformersForCausalLM):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            config = vllm_config.model_config.hf_config
            if "prompt_skip" in config.streamline_hooks:
                raise StreamlineError(
                    "The prompts of this checkpoint skip blocks, which vLLM does not support. Expected a checkpoint "
                    "without a committed PromptSkip. Serve the original, whose other weights are the same."
                )
            register_classes(base_class(type(config)))  # a worker gets the configuration from another process
            super().__init__(vllm_config=vllm_config, prefix=prefix)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            loaded: set[str] = super().load_weights(_own_shapes(weights, self.config.streamline_hooks["guard"]))
            expected = {name for name, _ in self.named_parameters() if is_splice_parameter(name)}
            if missing := sorted(expected - loaded):
                raise StreamlineError(
                    f"The checkpoint lacks weights of spliced modules: {', '.join(missing)}. Expected one weight for "
                    "each parameter. Save the model again."
                )
            return loaded

    SplicedForCausalLM.__qualname__ = _NAME  # vLLM looks the class up by its name
    return SplicedForCausalLM


def _own_shapes(weights: Iterable[tuple[str, Tensor]], guard: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a checkpoint, the guard without the leading axis with which it is stored."""
    for name, weight in weights:
        yield name, weight.squeeze(0) if name == guard else weight


def __getattr__(name: str) -> Any:
    """Return the class of the models, which needs vLLM."""
    if name == _NAME:
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
