"""Find, remove and repair the transformer blocks that do least (LLM-Streamline, arXiv 2403.19135)."""

from streamline_hooks.checkpoint import load, save
from streamline_hooks.compress import compress
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.evaluation import perplexity
from streamline_hooks.passes import resume
from streamline_hooks.recorder import HiddenStateRecorder
from streamline_hooks.replacements import LinearReplacement, register_replacement
from streamline_hooks.result import CompressionResult
from streamline_hooks.stack import BlockStack, find_stack, find_stacks
from streamline_hooks.statistics import Profile, WindowMoments, measure_moments, profile
from streamline_hooks.surgery import LayerSurgeon, SurgeryPlan
from streamline_hooks.surgery.registration import register_with_transformers

__all__ = [
    "BlockStack",
    "CompressionResult",
    "HiddenStateRecorder",
    "LayerSurgeon",
    "LinearReplacement",
    "Profile",
    "StreamlineError",
    "SurgeryPlan",
    "UnsupportedSurgery",
    "WindowMoments",
    "compress",
    "find_stack",
    "find_stacks",
    "load",
    "measure_moments",
    "perplexity",
    "profile",
    "register_replacement",
    "resume",
    "save",
]

register_with_transformers()
