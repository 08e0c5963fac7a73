"""Save, load, compare and export models, and process a checkpoint one block at a time."""

from streamline_hooks.checkpoint.blockwise_source import BlockwiseSource
from streamline_hooks.checkpoint.card import STAGE_LABELS, model_card
from streamline_hooks.checkpoint.compare import BlockMatch, compare_blocks
from streamline_hooks.checkpoint.elastic import save_elastic
from streamline_hooks.checkpoint.export.export_folder import check_export, export_folder, load_tokenizer
from streamline_hooks.checkpoint.export.gguf import GGUFDtype, export_gguf
from streamline_hooks.checkpoint.export.mlx import export_mlx
from streamline_hooks.checkpoint.export.onnx import export_onnx
from streamline_hooks.checkpoint.export.plain import check_no_splices, export_plain
from streamline_hooks.checkpoint.load import load, read_history, read_plans
from streamline_hooks.checkpoint.loading_config import LoadingConfig, available_devices
from streamline_hooks.checkpoint.offloaded import (
    offloaded_identity,
    open_checkpoint,
    stored_bytes,
)
from streamline_hooks.checkpoint.pretrained import (
    load_pretrained,
    load_processor,
    load_quietly,
    load_without_tokenizer,
    require_causal_lm,
    task_of_pretrained,
)
from streamline_hooks.checkpoint.push import push
from streamline_hooks.checkpoint.safety import CHECKSUMS, CONFIG, update_checksums
from streamline_hooks.checkpoint.save import REPORT, check_output_folder, save
from streamline_hooks.checkpoint.streaming import BlockwisePass, StateStorage, check_packing_blockwise

__all__ = [
    "CHECKSUMS",
    "CONFIG",
    "REPORT",
    "STAGE_LABELS",
    "BlockMatch",
    "BlockwisePass",
    "BlockwiseSource",
    "GGUFDtype",
    "LoadingConfig",
    "StateStorage",
    "available_devices",
    "check_export",
    "check_no_splices",
    "check_output_folder",
    "check_packing_blockwise",
    "compare_blocks",
    "export_folder",
    "export_gguf",
    "export_mlx",
    "export_onnx",
    "export_plain",
    "load",
    "load_pretrained",
    "load_processor",
    "load_quietly",
    "load_tokenizer",
    "load_without_tokenizer",
    "model_card",
    "offloaded_identity",
    "open_checkpoint",
    "push",
    "read_history",
    "read_plans",
    "require_causal_lm",
    "save",
    "save_elastic",
    "stored_bytes",
    "task_of_pretrained",
    "update_checksums",
]
