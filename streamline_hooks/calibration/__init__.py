"""The text a model is measured on: where it comes from, and which part of it is used for what."""

from streamline_hooks.calibration.documents import read_documents
from streamline_hooks.calibration.self_generated import self_generated
from streamline_hooks.calibration.split import TokenSplit, check_tokenizer, split_documents

__all__ = ["TokenSplit", "check_tokenizer", "read_documents", "self_generated", "split_documents"]
