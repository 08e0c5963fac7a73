from .checkpoint import load, save, save_elastic
from .core.errors import StreamlineError, UnsupportedSurgery
from .distillation.config import DistillationConfig
from .distillation.healing import HealingConfig
from .distillation.train import train
from .evaluation import evaluate, perplexity
from .modeling.block_stack import find_stack
from .pipeline.compress import compress
from .pipeline.config import CompressionConfig, DataConfig, RunOptions
from .pipeline.depths import fit_depths
from .pipeline.result import CompressionResult
from .pipeline.sweep import sweep
from .recording.recorder import HiddenStateRecorder
from .repair import LinearConfig, SwiGLUConfig, fit_windows
from .selection import Target, search, verify_shortlist
from .statistics import profile
from .surgery import LayerSurgeon, at_depth

__version__: str

__all__ = [
    "CompressionConfig",
    "CompressionResult",
    "DataConfig",
    "DistillationConfig",
    "HealingConfig",
    "HiddenStateRecorder",
    "LayerSurgeon",
    "LinearConfig",
    "RunOptions",
    "StreamlineError",
    "SwiGLUConfig",
    "Target",
    "UnsupportedSurgery",
    "at_depth",
    "compress",
    "evaluate",
    "find_stack",
    "fit_depths",
    "fit_windows",
    "load",
    "perplexity",
    "profile",
    "save",
    "save_elastic",
    "search",
    "sweep",
    "train",
    "verify_shortlist",
]
