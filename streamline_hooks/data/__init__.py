"""Read documents, images and pairs, and split them into disjoint calibration, validation and test batches."""

from streamline_hooks.data.documents import Documents, TextDataset, read_documents, stream_documents, text_column
from streamline_hooks.data.image_texts import (
    ImageText,
    contains_image_texts,
    image_text_parts,
    read_image_texts,
)
from streamline_hooks.data.images import Images, Picture, image_batches, image_parts, read_images
from streamline_hooks.data.mixture import SHARE_TOLERANCE, MixedSource, mixed_split, smallest_part
from streamline_hooks.data.packing import (
    PackedText,
    PackingConfig,
    document_starts,
    documents_of,
    pack,
    packed_batches,
    packed_text,
)
from streamline_hooks.data.packing_check import (
    check_document,
    check_packing,
    packed_run_error,
    piece_as_batch,
    rows_with_most_documents,
)
from streamline_hooks.data.self_generated import FORMS, TOPICS, SelfGenerationConfig, self_generated
from streamline_hooks.data.sources import (
    GENERATED_SOURCES,
    PartSizes,
    TextSources,
    accepted_modalities,
    read_recorded_source,
    task_batches,
)
from streamline_hooks.data.split import (
    PARTS,
    BatchSplit,
    TokenSplit,
    check_tokenizer,
    split_documents,
    with_repeated_passages,
)
from streamline_hooks.data.text_batches import text_parts
from streamline_hooks.data.text_pairs import TextPair, pair_parts, read_pairs

__all__ = [
    "FORMS",
    "GENERATED_SOURCES",
    "PARTS",
    "SHARE_TOLERANCE",
    "TOPICS",
    "BatchSplit",
    "Documents",
    "ImageText",
    "Images",
    "MixedSource",
    "PackedText",
    "PackingConfig",
    "PartSizes",
    "Picture",
    "SelfGenerationConfig",
    "TextDataset",
    "TextPair",
    "TextSources",
    "TokenSplit",
    "accepted_modalities",
    "check_document",
    "check_packing",
    "check_tokenizer",
    "contains_image_texts",
    "document_starts",
    "documents_of",
    "image_batches",
    "image_parts",
    "image_text_parts",
    "mixed_split",
    "pack",
    "packed_batches",
    "packed_run_error",
    "packed_text",
    "pair_parts",
    "piece_as_batch",
    "read_documents",
    "read_image_texts",
    "read_images",
    "read_pairs",
    "read_recorded_source",
    "rows_with_most_documents",
    "self_generated",
    "smallest_part",
    "split_documents",
    "stream_documents",
    "task_batches",
    "text_column",
    "text_parts",
    "with_repeated_passages",
]
