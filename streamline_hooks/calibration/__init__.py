"""Calibration data: read text, images and pairs, and split them into parts for calibration, validation and test."""

from streamline_hooks.calibration.boundaries import refuse_crossing
from streamline_hooks.calibration.documents import read_documents, stream_documents
from streamline_hooks.calibration.images import Images, Picture, image_batches, image_parts, read_images
from streamline_hooks.calibration.mixture import mixed_split
from streamline_hooks.calibration.packing import PackedText, beginnings, pack, packed_batches, packed_text
from streamline_hooks.calibration.repeated_passages import with_repeated_passages
from streamline_hooks.calibration.self_generated import self_generated
from streamline_hooks.calibration.split import TokenSplit, check_tokenizer, split_documents
from streamline_hooks.calibration.text_batches import text_parts
from streamline_hooks.calibration.text_pairs import TextPair, pair_parts, read_pairs

__all__ = [
    "Images",
    "PackedText",
    "Picture",
    "TextPair",
    "TokenSplit",
    "beginnings",
    "check_tokenizer",
    "image_batches",
    "image_parts",
    "mixed_split",
    "pack",
    "packed_batches",
    "packed_text",
    "pair_parts",
    "read_documents",
    "read_images",
    "read_pairs",
    "refuse_crossing",
    "self_generated",
    "split_documents",
    "stream_documents",
    "text_parts",
    "with_repeated_passages",
]
