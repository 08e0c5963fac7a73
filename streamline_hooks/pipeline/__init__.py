"""Compress a model end to end: configs and presets, sweeps, cost estimates and reports."""

from streamline_hooks.pipeline.apply import training_file
from streamline_hooks.pipeline.compress import compress
from streamline_hooks.pipeline.compress_checkpoint import BlockwiseOptions, compress_checkpoint
from streamline_hooks.pipeline.config import CompressionConfig, DataConfig, EvaluationConfig, RunOptions
from streamline_hooks.pipeline.cost import (
    BlockwiseEstimate,
    Rates,
    StageWork,
    blockwise_work,
    checkpoint_bytes,
    fits_in_memory,
    format_duration,
    measure_rates,
    state_memory_left,
)
from streamline_hooks.pipeline.depths import ChosenDepth, FittedDepth, choose_depth, fit_depths
from streamline_hooks.pipeline.job import CompressionJob, JobData, JobLimits, suite_for_model, takes_documents
from streamline_hooks.pipeline.plan import TrainingPlan, estimate_cost, estimate_ranking, plan_training
from streamline_hooks.pipeline.prepare import split_held_out
from streamline_hooks.pipeline.presets import PRESETS, Preset
from streamline_hooks.pipeline.prompt_skip import FittedPromptSkip, fit_prompt_skip
from streamline_hooks.pipeline.ranking_job import RankingJob
from streamline_hooks.pipeline.refit import PLAIN_KINDS, RefitResult, refit, refit_kinds
from streamline_hooks.pipeline.report import write_report
from streamline_hooks.pipeline.result import CompressionResult
from streamline_hooks.pipeline.shapes import DeviceRates, ModelShape, ShapeEstimate, estimate_from_shape
from streamline_hooks.pipeline.stage_times import CostEstimate, measure_training
from streamline_hooks.pipeline.sweep import SpeedConfig, Sweep, sweep

__all__ = [
    "PLAIN_KINDS",
    "PRESETS",
    "BlockwiseEstimate",
    "BlockwiseOptions",
    "ChosenDepth",
    "CompressionConfig",
    "CompressionJob",
    "CompressionResult",
    "CostEstimate",
    "DataConfig",
    "DeviceRates",
    "EvaluationConfig",
    "FittedDepth",
    "FittedPromptSkip",
    "JobData",
    "JobLimits",
    "ModelShape",
    "Preset",
    "RankingJob",
    "Rates",
    "RefitResult",
    "RunOptions",
    "ShapeEstimate",
    "SpeedConfig",
    "StageWork",
    "Sweep",
    "TrainingPlan",
    "blockwise_work",
    "checkpoint_bytes",
    "choose_depth",
    "compress",
    "compress_checkpoint",
    "estimate_cost",
    "estimate_from_shape",
    "estimate_ranking",
    "fit_depths",
    "fit_prompt_skip",
    "fits_in_memory",
    "format_duration",
    "measure_rates",
    "measure_training",
    "plan_training",
    "refit",
    "refit_kinds",
    "split_held_out",
    "state_memory_left",
    "suite_for_model",
    "sweep",
    "takes_documents",
    "training_file",
    "write_report",
]
