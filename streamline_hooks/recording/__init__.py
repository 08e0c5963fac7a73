"""Record the hidden states of a model while it runs."""

from streamline_hooks.recording.recorder import ForwardStopped, HiddenStateRecorder, RecordingConfig
from streamline_hooks.recording.sites import BLOCK_SITES, MODEL_SITES, BlockSite, ModelSite, Site

__all__ = [
    "BLOCK_SITES",
    "MODEL_SITES",
    "BlockSite",
    "ForwardStopped",
    "HiddenStateRecorder",
    "ModelSite",
    "RecordingConfig",
    "Site",
]
