"""Record the hidden states of a model while it runs, and store them in a folder."""

from streamline_hooks.recording.activation_store import ActivationStore
from streamline_hooks.recording.recorder import ForwardStopped, HiddenStateRecorder

__all__ = ["ActivationStore", "ForwardStopped", "HiddenStateRecorder"]
