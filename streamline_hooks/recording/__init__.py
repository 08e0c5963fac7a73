"""Record and change the activations of a model while it runs, and store them in a folder."""

from streamline_hooks.recording.activation_store import ActivationStore
from streamline_hooks.recording.edits import Add, Edit, EditCall, Mean, Patch, Replace, Resample, Scale, Zero
from streamline_hooks.recording.intervention import Intervention
from streamline_hooks.recording.recorder import ForwardStopped, HiddenStateRecorder, RecordingConfig
from streamline_hooks.recording.sites import BLOCK_SITES, MODEL_SITES, BlockSite, ModelSite, Site

__all__ = [
    "BLOCK_SITES",
    "MODEL_SITES",
    "ActivationStore",
    "Add",
    "BlockSite",
    "Edit",
    "EditCall",
    "ForwardStopped",
    "HiddenStateRecorder",
    "Intervention",
    "Mean",
    "ModelSite",
    "Patch",
    "RecordingConfig",
    "Replace",
    "Resample",
    "Scale",
    "Site",
    "Zero",
]
