"""One HTML page about a compression, an evaluation or a sweep."""

from streamline_hooks.report.report import write_report

__all__ = ["write_report"]
