"""For your own tests: one-line checks, and tiny random models of every causal language model to run them on."""

from streamline_hooks.testing.assertions import (
    assert_cached_generation_matches,
    assert_causal,
    assert_checkpoint_round_trip,
    assert_identity_preserves_output,
    assert_removal_equals_shorter_model,
    assert_restores,
    assert_shapes,
)
from streamline_hooks.testing.tiny import causal_model_types, tiny_config, tiny_inputs, tiny_model

__all__ = [
    "assert_cached_generation_matches",
    "assert_causal",
    "assert_checkpoint_round_trip",
    "assert_identity_preserves_output",
    "assert_removal_equals_shorter_model",
    "assert_restores",
    "assert_shapes",
    "causal_model_types",
    "tiny_config",
    "tiny_inputs",
    "tiny_model",
]
