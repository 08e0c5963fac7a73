"""What every other sub-package builds on: errors and files."""

from streamline_hooks.core.files import atomic_file, atomic_folder, check_writable

__all__ = ["atomic_file", "atomic_folder", "check_writable"]
