"""Remove blocks at steps of a training by Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from streamline_hooks.errors import StreamlineError
from streamline_hooks.in_training.progressive_removal import ProgressiveRemoval, Window
from streamline_hooks.in_training.removal_record import Removal

_PARALLEL = {
    ParallelMode.DISTRIBUTED: "several processes train one model, each behind a wrapper (DDP)",
    ParallelMode.NOT_DISTRIBUTED: "several devices of one process train one model (DataParallel)",
}


class ProgressiveRemovalCallback(TrainerCallback):
    """Carry out a `ProgressiveRemoval` inside a ``transformers.Trainer``, on one device.

    The steps are the Trainer's own (``state.global_step``), and a checkpoint that it writes after a removal, at the
    same step or later, is the shorter model's. To resume from one, give the Trainer the model of the checkpoint::

        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        trainer = Trainer(model, args, callbacks=[ProgressiveRemovalCallback(schedule)], ...)
        trainer.train(resume_from_checkpoint=checkpoint)

    Parameters
    ----------
    schedule : mapping of int to range or callable
        As for `ProgressiveRemoval`.
    run : str
        A name for the training, as for `ProgressiveRemoval`.
    stack : str, optional
        Path of the stack, see `find_stack`.

    Notes
    -----
    When the training begins a `StreamlineError` is raised where the Trainer wraps the model (several processes or
    devices, FSDP, DeepSpeed) or compiles it, where it is to load its best checkpoint at the end, which may have other
    blocks than the model has then, and where the model is not the one of the step at which the training goes on. The
    Trainer itself raises before that where it is given a full model and a shortened one's checkpoint with the
    optimiser's state, in PyTorch's words: the size of a parameter group does not match.

    Examples
    --------
    >>> callback = ProgressiveRemovalCallback({100: range(12, 14), 200: range(20, 22)})
    >>> callback.done
    ()
    """

    def __init__(self, schedule: Mapping[int, Window], *, run: str = "training", stack: str | None = None) -> None:
        self.schedule, self.run, self.stack = schedule, run, stack
        self._removal: ProgressiveRemoval | None = None

    @property
    def done(self) -> tuple[Removal, ...]:
        """The removals of this training so far, those before it was resumed included."""
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
        """Refuse what would go wrong, and see that the model is the one of this step."""
        _refuse_wrapping(args, optimizer)
        if args.load_best_model_at_end:
            raise StreamlineError(
                "load_best_model_at_end=True loads weights of an earlier step into the model of the last one. A "
                "removal in between makes these two different models, and blocks would get the weights of others. "
                "Leave it False, and load the checkpoint that you want with from_pretrained."
            )
        assert model is not None
        self._removal = ProgressiveRemoval(model, self.schedule, optimizer, run=self.run, stack=self.stack)
        self._removal.resume(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Carry out what is due."""
        assert self._removal is not None
        self._removal.step(state.global_step)


def _refuse_wrapping(args: TrainingArguments, optimizer: Any) -> None:
    what = _PARALLEL.get(
        args.parallel_mode, "" if args.parallel_mode == ParallelMode.NOT_PARALLEL else "it is parallel"
    )
    plugins = getattr(optimizer, "accelerator_state", None)
    if args.fsdp or getattr(plugins, "fsdp_plugin", None) is not None:
        what = "it shards the model (FSDP)"
    elif args.deepspeed or getattr(plugins, "deepspeed_plugin", None) is not None:
        what = "it wraps the model (DeepSpeed)"
    if what:
        raise StreamlineError(
            f"ProgressiveRemovalCallback cannot work in this Trainer: {what}, and surgery comes before wrapping. Train "
            "on one device (CUDA_VISIBLE_DEVICES=0), or in parts: a Trainer up to a removal, LayerSurgeon with "
            "commit() on the model itself, and a new Trainer."
        )
    compiler = getattr(getattr(plugins, "dynamo_plugin", None), "backend", None)
    if args.torch_compile or getattr(compiler, "value", "NO") != "NO":
        raise StreamlineError(
            "ProgressiveRemovalCallback cannot work in a Trainer that compiles the model. Leave torch_compile away, or "
            "train in parts: a Trainer up to a removal, LayerSurgeon with commit(), and a new Trainer."
        )
