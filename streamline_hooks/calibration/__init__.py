"""The text a model is measured on: where it comes from, and which part of it is used for what."""

from streamline_hooks.calibration.boundaries import refuse_crossing
from streamline_hooks.calibration.documents import read_documents
from streamline_hooks.calibration.packed_text import PackedText, packed_text
from streamline_hooks.calibration.packing import beginnings, pack, packed_batches
from streamline_hooks.calibration.self_generated import self_generated
from streamline_hooks.calibration.split import TokenSplit, check_tokenizer, split_documents
from streamline_hooks.calibration.streaming import stream_documents

__all__ = [
    "PackedText",
    "TokenSplit",
    "beginnings",
    "check_tokenizer",
    "pack",
    "packed_batches",
    "packed_text",
    "read_documents",
    "refuse_crossing",
    "self_generated",
    "split_documents",
    "stream_documents",
]
