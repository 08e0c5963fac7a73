"""Other tools that this library works with; each is optional, and imported when it is used."""

from streamline_hooks.integrations.monitor_callback import MonitorCallback
from streamline_hooks.integrations.progressive_removal_callback import ProgressiveRemovalCallback

__all__ = ["MonitorCallback", "ProgressiveRemovalCallback"]
