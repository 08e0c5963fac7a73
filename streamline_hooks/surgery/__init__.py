"""Taking blocks out of a model and putting others in, reversibly and for good."""

from streamline_hooks.surgery.hazards import Hazard
from streamline_hooks.surgery.plan import Slot, Splice, SurgeryPlan
from streamline_hooks.surgery.surgeon import LayerSurgeon

__all__ = ["Hazard", "LayerSurgeon", "Slot", "Splice", "SurgeryPlan"]
