"""Remove, replace, insert, zero and fold blocks, reversibly; verify the result; commit it.

`LayerSurgeon` is the entry point. A committed model has one `SurgeryPlan` per surgery.
"""

from streamline_hooks.surgery.bypass import bypass, bypassing
from streamline_hooks.surgery.config_copies import ConfigCopies
from streamline_hooks.surgery.depths import (
    DepthCut,
    DepthCuts,
    at_depth,
    attach_depths,
    depth_cuts_of,
    depths_of,
    is_elastic,
    set_depths,
)
from streamline_hooks.surgery.edits import COPIED_FROM, RECORD, Edits, OriginalBlock
from streamline_hooks.surgery.fold import foldable
from streamline_hooks.surgery.hazards import Hazard, find_hazards
from streamline_hooks.surgery.history import (
    PLAIN_FORMAT,
    CombinedPlan,
    combine_plans,
    committed_surgeries,
    describe_stacks,
    replay_surgeries,
    surgery_records,
)
from streamline_hooks.surgery.layer_indices import (
    INDEX_NAMES,
    config_for_blocks,
    find_config_copies,
    find_index_attributes,
)
from streamline_hooks.surgery.layout import StackLayout, checked_window
from streamline_hooks.surgery.model_source import ModelSource, as_state_source
from streamline_hooks.surgery.placement import match_block, matched_dtype
from streamline_hooks.surgery.plan import Slot, Splice, SurgeryPlan
from streamline_hooks.surgery.probe import find_mismatch, run_reference_with_hooks, without_masks
from streamline_hooks.surgery.prompt_skip import LAST_TOKENS, PromptSkip, find_prompt_skip, prompt_skip_of
from streamline_hooks.surgery.resume import resume
from streamline_hooks.surgery.save_guard import saved_model_depth
from streamline_hooks.surgery.session import refuse_open_surgery
from streamline_hooks.surgery.special_weights import find_per_layer_weights, per_layer_width
from streamline_hooks.surgery.splice import (
    AFTER,
    BEFORE,
    run_before,
    run_splices,
    set_splices,
    snapshot_splices,
    spliced,
)
from streamline_hooks.surgery.spliced_model import (
    MODEL_TYPE,
    StreamlinedConfig,
    base_class,
    is_splice_parameter,
    register_classes,
)
from streamline_hooks.surgery.surgeon import LayerSurgeon
from streamline_hooks.surgery.token_outputs import (
    WHOLE_LOGIT_BYTES,
    Head,
    agrees_with_forward,
    has_large_logits,
    lm_head_of,
    outputs_by_token,
    require_token_by_token,
    rows_within_memory,
    split_large_batches,
    tokens_within_memory,
)
from streamline_hooks.surgery.zeroed_branches import (
    find_zeros,
    zero_output,
    zero_parameter_ids,
    zero_parameters,
)

__all__ = [
    "AFTER",
    "BEFORE",
    "COPIED_FROM",
    "INDEX_NAMES",
    "LAST_TOKENS",
    "MODEL_TYPE",
    "PLAIN_FORMAT",
    "RECORD",
    "WHOLE_LOGIT_BYTES",
    "CombinedPlan",
    "ConfigCopies",
    "DepthCut",
    "DepthCuts",
    "Edits",
    "Hazard",
    "Head",
    "LayerSurgeon",
    "ModelSource",
    "OriginalBlock",
    "PromptSkip",
    "Slot",
    "Splice",
    "StackLayout",
    "StreamlinedConfig",
    "SurgeryPlan",
    "agrees_with_forward",
    "as_state_source",
    "at_depth",
    "attach_depths",
    "base_class",
    "bypass",
    "bypassing",
    "checked_window",
    "combine_plans",
    "committed_surgeries",
    "config_for_blocks",
    "depth_cuts_of",
    "depths_of",
    "describe_stacks",
    "find_config_copies",
    "find_hazards",
    "find_index_attributes",
    "find_mismatch",
    "find_per_layer_weights",
    "find_prompt_skip",
    "find_zeros",
    "foldable",
    "has_large_logits",
    "is_elastic",
    "is_splice_parameter",
    "lm_head_of",
    "match_block",
    "matched_dtype",
    "outputs_by_token",
    "per_layer_width",
    "prompt_skip_of",
    "refuse_open_surgery",
    "register_classes",
    "replay_surgeries",
    "require_token_by_token",
    "resume",
    "rows_within_memory",
    "run_before",
    "run_reference_with_hooks",
    "run_splices",
    "saved_model_depth",
    "set_depths",
    "set_splices",
    "snapshot_splices",
    "spliced",
    "split_large_batches",
    "surgery_records",
    "tokens_within_memory",
    "without_masks",
    "zero_output",
    "zero_parameter_ids",
    "zero_parameters",
]
