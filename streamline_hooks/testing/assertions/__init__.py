"""One-line checks for your own tests: of a replacement, a surgery, a model, a checkpoint."""

from streamline_hooks.testing.assertions.cached_generation import assert_cached_generation_matches
from streamline_hooks.testing.assertions.causality import assert_causal
from streamline_hooks.testing.assertions.identity import assert_identity_preserves_output
from streamline_hooks.testing.assertions.removal import assert_removal_equals_shorter_model
from streamline_hooks.testing.assertions.restoration import assert_restores
from streamline_hooks.testing.assertions.round_trip import assert_checkpoint_round_trip
from streamline_hooks.testing.assertions.shapes import assert_shapes

__all__ = [
    "assert_cached_generation_matches",
    "assert_causal",
    "assert_checkpoint_round_trip",
    "assert_identity_preserves_output",
    "assert_removal_equals_shorter_model",
    "assert_restores",
    "assert_shapes",
]
