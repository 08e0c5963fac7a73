"""One page that tells what was removed, how it was repaired, and what was lost."""

from streamline_hooks.report.page import write_report

__all__ = ["write_report"]
