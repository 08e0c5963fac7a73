"""For your own tests: tiny random models of every causal language model."""

from streamline_hooks.testing.inputs import tiny_inputs
from streamline_hooks.testing.tiny import causal_model_types, tiny_config, tiny_model

__all__ = ["causal_model_types", "tiny_config", "tiny_inputs", "tiny_model"]
