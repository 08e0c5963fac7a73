"""Callbacks of Hugging Face's Trainer to monitor hidden states and to remove blocks during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.training_args import ParallelMode

from streamline_hooks.core import Batches, StreamlineError
from streamline_hooks.repair import ReplacementConfig
from streamline_hooks.training.monitor import HiddenStateMonitor
from streamline_hooks.training.progressive_removal import ProgressiveRemoval, Removal, RemovalWindow


class MonitorCallback(TrainerCallback):
    """Measure the hidden states of every N-th step of a ``Trainer``, and log them with the trainer's callbacks.

    The values are passed to all logging callbacks of the trainer (TensorBoard, Weights & Biases, ...) except those that
    print to the console. The log history of the trainer is not changed.

    Parameters
    ----------
    trainer : transformers.Trainer
        The trainer to which this callback is added, see the example.
    every : int
        Measure steps 1, 1 + every, 1 + 2·every and so on; a resumed run continues this sequence.
    **options
        Further arguments of `HiddenStateMonitor`.

    Attributes
    ----------
    monitor : HiddenStateMonitor

    Raises
    ------
    StreamlineError
        In the same cases as `HiddenStateMonitor`.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import Trainer, TrainingArguments
    >>> from streamline_hooks.testing import tiny_inputs, tiny_model
    >>> model = tiny_model("llama", blocks=2)
    >>> rows = [{"input_ids": ids, "labels": ids} for ids in tiny_inputs(model)["input_ids"]]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     arguments = TrainingArguments(folder, max_steps=3, report_to=[], disable_tqdm=True, use_cpu=True)
    ...     trainer = Trainer(model, arguments, train_dataset=rows)
    ...     trainer.add_callback(MonitorCallback(trainer, every=2, file=f"{folder}/states.jsonl"))
    ...     _ = trainer.train()
    ...     print(len(open(f"{folder}/states.jsonl").readlines()), "steps were measured")
    {'train_runtime': ...}
    2 steps were measured
    """

    def __init__(self, trainer: Any, every: int = 50, **options: Any) -> None:
        self._trainer, self._scale = trainer, 1.0
        self._options = {"every": every, "log": self._log, **options}
        self.monitor = HiddenStateMonitor(trainer.model, **self._options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the monitor; a monitor left open by an interrupted run is closed first."""
        self.monitor.close()
        if kwargs["model"] is not self.monitor.model:  # a Trainer with model_init creates a model for each run
            self.monitor = HiddenStateMonitor(kwargs["model"], **self._options)
        self.monitor.open(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the loss scale of this step."""
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        self._scale = 1.0 if scaler is None else float(scaler.get_scale())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the step of the monitor."""
        self.monitor.step(state.global_step, grad_scale=self._scale)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks."""
        self.monitor.close()

    def _log(self, values: dict[str, float], *, step: int) -> None:
        trainer, handler = self._trainer, self._trainer.callback_handler
        names = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
        arguments = {name: getattr(handler, name, None) for name in names}
        for callback in handler.callbacks:
            if callback is not self and not isinstance(callback, (PrinterCallback, ProgressCallback)):
                callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(values), **arguments)


class ProgressiveRemovalCallback(TrainerCallback):
    """Run a `ProgressiveRemoval` inside a ``transformers.Trainer``, on one device.

    Steps are counted by the Trainer (``state.global_step``). With `replacement`, the Trainer's optimizer also trains
    the replacements. A checkpoint written at or after a removal contains the shorter model. To resume from it, create
    the Trainer with the model of the checkpoint, and give the callback the same arguments::

        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        trainer = Trainer(model, args, callbacks=[ProgressiveRemovalCallback(schedule)], ...)
        trainer.train(resume_from_checkpoint=checkpoint)

    Parameters
    ----------
    schedule : mapping of int to range or callable
        See `ProgressiveRemoval`.
    run : str
        Name of the training run, see `ProgressiveRemoval`.
    stack : str, optional
        Path of the stack, see `find_stack`.
    replacement, fit, held_out : optional
        What replaces each window, and the batches to fit it on, see `ProgressiveRemoval`.

    Notes
    -----
    A `StreamlineError` is raised at the beginning of training if the Trainer wraps the model (several processes or
    devices, FSDP, DeepSpeed) or compiles it; if ``load_best_model_at_end`` is set, because the best checkpoint may have
    other blocks; and if the model does not belong to the step at which training is resumed. If a full model is resumed
    from a checkpoint of a shortened model with the optimizer's state, the Trainer raises earlier, because the sizes of
    the parameter groups differ.

    Examples
    --------
    >>> callback = ProgressiveRemovalCallback({100: range(12, 14), 200: range(20, 22)})
    >>> callback.done
    ()
    """

    def __init__(
        self,
        schedule: Mapping[int, RemovalWindow],
        *,
        run: str = "training",
        stack: str | None = None,
        replacement: ReplacementConfig | None = None,
        fit: Batches | None = None,
        held_out: Batches | None = None,
    ) -> None:
        self.schedule = schedule
        self._options: dict[str, Any] = {"run": run, "stack": stack}
        self._options |= {"replacement": replacement, "fit": fit, "held_out": held_out}
        self._removal: ProgressiveRemoval | None = None

    @property
    def done(self) -> tuple[Removal, ...]:
        """Return the removals of this training run so far, including those before it was resumed."""
        return self._removal.done if self._removal is not None else ()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse unsupported settings, and check that the model belongs to this step."""
        _refuse_wrapping(args, optimizer)
        if args.load_best_model_at_end:
            raise StreamlineError(
                "load_best_model_at_end=True is not supported: it loads the weights of an earlier step into the final "
                "model, and a removal in between would load weights into the wrong blocks. Set it to False, and load "
                "the best checkpoint with from_pretrained."
            )
        assert model is not None
        self._removal = ProgressiveRemoval(model, self.schedule, optimizer, **self._options)
        self._removal.resume(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the window scheduled after this step."""
        assert self._removal is not None
        self._removal.step(state.global_step)


_PARALLEL = {
    ParallelMode.NOT_PARALLEL: "",
    ParallelMode.DISTRIBUTED: "it trains on several processes and wraps the model (DDP)",
    ParallelMode.NOT_DISTRIBUTED: "it trains on several devices in one process (DataParallel)",
}


def _refuse_wrapping(args: TrainingArguments, optimizer: Any) -> None:
    reason = _PARALLEL.get(args.parallel_mode, "it is parallel")
    plugins = getattr(optimizer, "accelerator_state", None)
    if args.fsdp or getattr(plugins, "fsdp_plugin", None) is not None:
        reason = "it shards the model (FSDP)"
    elif args.deepspeed or getattr(plugins, "deepspeed_plugin", None) is not None:
        reason = "it wraps the model (DeepSpeed)"
    compiler = getattr(getattr(plugins, "dynamo_plugin", None), "backend", None)
    if not reason and (args.torch_compile or getattr(compiler, "value", "NO") != "NO"):
        reason = "it compiles the model (torch_compile)"
    if reason:
        raise StreamlineError(
            f"ProgressiveRemovalCallback does not support this Trainer: {reason}. Expected a model that is neither "
            "wrapped nor compiled. Train on one device (CUDA_VISIBLE_DEVICES=0) without torch_compile, or in parts: a "
            "Trainer up to a removal, LayerSurgeon with commit() on the unwrapped model, and a new Trainer."
        )
