"""Assertions, tiny random models and Hypothesis strategies for tests of hooks, replacements and surgery."""

from streamline_hooks.testing.cached_generation import assert_cached_generation_matches
from streamline_hooks.testing.causality import assert_causal
from streamline_hooks.testing.checkpoint_round_trip import assert_checkpoint_round_trip
from streamline_hooks.testing.checks import run_checks
from streamline_hooks.testing.faithful_recording import assert_recording_is_faithful
from streamline_hooks.testing.restoration import assert_restores
from streamline_hooks.testing.shapes import assert_shapes
from streamline_hooks.testing.surgery_assertions import (
    assert_identity_preserves_output,
    assert_removal_equals_shorter_model,
)
from streamline_hooks.testing.tiny_models import (
    causal_model_types,
    tiny_config,
    tiny_inputs,
    tiny_model,
    tiny_tokenizer,
)

__all__ = [
    "assert_cached_generation_matches",
    "assert_causal",
    "assert_checkpoint_round_trip",
    "assert_identity_preserves_output",
    "assert_recording_is_faithful",
    "assert_removal_equals_shorter_model",
    "assert_restores",
    "assert_shapes",
    "causal_model_types",
    "run_checks",
    "tiny_config",
    "tiny_inputs",
    "tiny_model",
    "tiny_tokenizer",
]
