"""The monitor inside Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from streamline_hooks.in_training import HiddenStateMonitor


class MonitorCallback(TrainerCallback):
    """Measure the hidden states of every N-th step of a ``Trainer``, and log them to whatever it logs to.

    The values go to all of the trainer's callbacks that log (TensorBoard, Weights & Biases, ...) but to those that
    print: they are several numbers a block. The trainer's own log history is left as it is.

    Parameters
    ----------
    trainer : transformers.Trainer
        Which this is added to, see the example.
    every : int
        Measure steps 1, 1 + every, 1 + 2·every and so on, also when a training is resumed.
    **options
        See `HiddenStateMonitor`.

    Attributes
    ----------
    monitor : HiddenStateMonitor

    Raises
    ------
    StreamlineError
        As `HiddenStateMonitor` does.

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
        """Open the monitor; one that an interrupted training left open is closed first."""
        self.monitor.close()
        if kwargs["model"] is not self.monitor.model:  # a Trainer with model_init makes one for each training
            self.monitor = HiddenStateMonitor(kwargs["model"], **self._options)
        self.monitor.open(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what the loss of this step was multiplied by."""
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        self._scale = 1.0 if scaler is None else float(scaler.get_scale())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say that a step has been made."""
        self.monitor.step(state.global_step, grad_scale=self._scale)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks away."""
        self.monitor.close()

    def _log(self, values: dict[str, float], *, step: int) -> None:
        trainer, handler = self._trainer, self._trainer.callback_handler
        names = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
        given = {name: getattr(handler, name, None) for name in names}
        for callback in handler.callbacks:
            if callback is not self and not isinstance(callback, (PrinterCallback, ProgressCallback)):
                callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(values), **given)
