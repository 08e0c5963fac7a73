"""Record the hidden states of a model while it runs."""

from streamline_hooks.recording.recorder import ForwardStopped, HiddenStateRecorder

__all__ = ["ForwardStopped", "HiddenStateRecorder"]
