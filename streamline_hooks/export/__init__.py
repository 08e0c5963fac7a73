"""A compressed model for engines that know nothing of this library."""

from streamline_hooks.export.folder import check_export, export_folder
from streamline_hooks.export.gguf import export_gguf
from streamline_hooks.export.onnx import export_onnx
from streamline_hooks.export.plain import export_plain, require_plain
from streamline_hooks.export.refit import Refitted, refit

__all__ = [
    "Refitted",
    "check_export",
    "export_folder",
    "export_gguf",
    "export_onnx",
    "export_plain",
    "refit",
    "require_plain",
]
