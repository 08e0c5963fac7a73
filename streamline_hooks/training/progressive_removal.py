"""Remove or replace blocks at given steps of a training run, and record this in the model's history."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from streamline_hooks.core import (
    Batch,
    Batches,
    StreamlineError,
    UnsupportedSurgery,
    batches_digest,
    describe_blocks,
    padding_mask,
    refuse_compiled,
    refuse_wrapped,
    validate_arguments,
)
from streamline_hooks.modeling import BlockStack, find_stack
from streamline_hooks.repair import (
    FoldedConfig,
    InheritedBlocks,
    NoneConfig,
    Repair,
    ReplacementConfig,
    ScaleConfig,
    WindowReplacement,
    fit_windows,
    insert_replacement,
    is_spliced,
)
from streamline_hooks.replacements import replacement_config
from streamline_hooks.surgery import LayerSurgeon, SurgeryPlan, checked_window, saved_model_depth
from streamline_hooks.surgery import committed_surgeries as plain_history
from streamline_hooks.training.parameter_groups import (
    add_parameters,
    block_parameters,
    choose_peers,
    drop_parameters,
    follow_names,
    norms_and_biases,
    record_names,
    rename_parameters,
    require_in_optimizer,
)

RemovalWindow = range | Callable[[nn.Module], range]
"""A window numbered as at the start of training, or a function that returns a window in the current numbering."""

_NOTE = "progressive_removal"
_FIRST = "first_since_the_start_of"  # names of the runs that started just before this surgery


@dataclass(frozen=True)
class Removal:
    """A removal of blocks during a training run.

    Attributes
    ----------
    step : int
        The optimizer step after which the blocks were removed.
    blocks : tuple of int or None
        The removed blocks, numbered as at the start of training; None for a block that was inserted later.
    plan : SurgeryPlan
        The surgery, in the numbering just before the removal.
    replacement : ReplacementConfig or None
        The config of the inserted replacement, with the seed that it was built with; None for plain removal.
    removal_error, repaired_error : float or None
        Relative squared errors of the state after the window on the held-out batches, see
        `streamline_hooks.repair.Repair`; None for plain removal.

    Examples
    --------
    >>> from streamline_hooks.testing import tiny_model
    >>> removal = ProgressiveRemoval(tiny_model("llama", blocks=6), {1: range(1, 2)}).step(1)
    >>> removal.step, removal.blocks, removal.plan.removed
    (1, (1,), (1,))
    """

    step: int
    blocks: tuple[int | None, ...]
    plan: SurgeryPlan
    replacement: ReplacementConfig | None = None
    removal_error: float | None = None
    repaired_error: float | None = None


class ProgressiveRemoval:
    """Remove or replace windows of blocks permanently at given steps of a training run.

    Each removal is a committed `LayerSurgeon`: the model is changed in place and saved as the shorter model. The
    optimizer keeps the remaining parameters and their state. With `replacement`, each window is replaced by a module
    that is fitted by least squares on the model as it is at that step, and its parameters are added to the optimizer.

    Parameters
    ----------
    model : torch.nn.Module
        The model to train, neither compiled nor wrapped. Under DDP or FSDP, unwrap the model, call `step`, and wrap the
        model again; the old wrapper would still use the removed parameters.
    schedule : mapping of int to range or callable
        The window to remove after each optimizer step, counted from 1. A range is numbered as at the start of training
        (when this object was created, unless training is resumed), regardless of later surgeries. A function receives
        the model and returns a window in the current numbering.
    optimizer : torch.optim.Optimizer, optional
        Optimizer from which to drop the removed parameters; may be wrapped by Accelerate. Default: no optimizer is
        changed.
    run : str
        Name of the training run. It is stored in the model's configuration with each removal, and at the first `step`
        after another surgery, so that a resumed run recognizes its start and its removals.
    stack : str, optional
        Path of the stack, see `find_stack`.
    replacement : ReplacementConfig, optional
        What replaces each window, for example ``LinearConfig()``. The optimizer is then required. A config without a
        seed gets the number of the step as its seed. Default: plain removal.
    fit, held_out : sequence of mapping or torch.Tensor, optional
        Batches to fit the replacements on, and batches of other documents to choose the ridge on; required with
        `replacement`.

    Raises
    ------
    StreamlineError
        If the model is compiled or wrapped, the schedule does not fit the model, or the optimizer has none of its
        parameters. With `replacement`: if the optimizer or the batches are missing, or the optimizer has loaded a state
        in another order.
    UnsupportedSurgery
        If a range of the schedule cannot be removed, replaced or committed. All ranges are tried when the object is
        created. With `replacement`: if a parameter of a window is not in the optimizer, the kind changes weights of
        blocks that stay (folded, scale), it has frozen weights (silenced), or the run is distributed.

    Notes
    -----
    A copied block of the model (`BlockConfig`, `MergedConfig`) joins the parameter groups of the block that it was
    copied from. Of another replacement, the biases and the weights of norms join the group that has most elements of
    the biases and norms of the removed blocks, and all other weights the group that has most elements of their other
    weights; of equal groups, the first. So weight decay and learning rate continue, and schedulers see the same groups.

    A resumed run equals an uninterrupted run bit for bit if it loads the model and the state of the optimizer, the
    scheduler and the random number generators of one step, and gets the same schedule, replacement and batches. Fitting
    draws no random numbers from the global generators. Each group of the optimizer stores the names of its parameters
    (``"streamline_hooks_names"``), and `load_state_dict` called after the creation of this object restores their order;
    the order of a state that was loaded before is verified.

    Examples
    --------
    >>> import torch
    >>> from streamline_hooks.testing import tiny_inputs, tiny_model
    >>> model = tiny_model("llama", blocks=6).train()
    >>> optimizer, inputs = torch.optim.AdamW(model.parameters()), tiny_inputs(model)
    >>> removal = ProgressiveRemoval(model, {1: range(1, 2), 3: range(3, 5)}, optimizer)
    >>> for step in range(1, 5):
    ...     model(**inputs, labels=inputs["input_ids"]).loss.backward()
    ...     optimizer.step()
    ...     done = removal.step(step)
    ...     print(len(model.model.layers), done.blocks if done else "")
    ...     optimizer.zero_grad()
    5 (1,)
    5
    3 (3, 4)
    3

    Replace block 1 of the 3 remaining blocks by a linear map:

    >>> from streamline_hooks import LinearConfig
    >>> batches = [tiny_inputs(model, seed=seed) for seed in (1, 2)]
    >>> parts = {"fit": batches[:1], "held_out": batches[1:]}
    >>> second = ProgressiveRemoval(
    ...     model, {1: range(1, 2)}, optimizer, run="second", replacement=LinearConfig(), **parts
    ... )
    >>> done = second.step(1)
    >>> done.blocks, len(model.model.layers), model.model.layers[1].spliced_before
    ((1,), 2, ModuleList(
      (0): LinearReplacement(
        (projection): Linear(in_features=32, out_features=32, bias=False)
      )
    ))
    >>> {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    True
    """

    @validate_arguments()
    def __init__(
        self,
        model: nn.Module,
        schedule: Mapping[int, RemovalWindow],
        optimizer: Optimizer | None = None,
        *,
        run: str = "training",
        stack: str | None = None,
        replacement: ReplacementConfig | None = None,
        fit: Batches | None = None,
        held_out: Batches | None = None,
    ) -> None:
        refuse_compiled(model, "remove blocks of")
        try:
            refuse_wrapped(model)
        except StreamlineError as error:
            raise StreamlineError(
                f"{error} During training: unwrap the model, call step, and wrap the model again."
            ) from None
        self.model, self.optimizer, self.run = model, optimizer, run
        self._insertion = _insertion(replacement, fit, held_out, optimizer)
        block_stack = find_stack(model, stack)
        self._stack_path, history = block_stack.path, _history_of(block_stack)
        self._start = _start_of(history, run)  # number of surgeries committed before
        self._resumed = self._start < len(history)
        self._length: int = history[self._start]["old_length"] if self._resumed else len(block_stack)
        self._follow()
        self._done = [_recorded_removal(entry) for entry in history if _belongs_to_run(entry, run)]
        self._digests: dict[int, str | None] = {
            entry[_NOTE]["step"]: entry[_NOTE].get("batches") for entry in history if _belongs_to_run(entry, run)
        }
        self._at: int | None = None
        if not schedule:
            raise StreamlineError(
                "The schedule is empty. Expected a window for at least one optimizer step, such as {100: range(3, 5)}."
            )
        self.schedule: dict[int, RemovalWindow] = {}
        for step in sorted(map(operator.index, schedule)):
            if step < 1:
                raise StreamlineError(f"The schedule has step {step}. Expected steps >= 1: steps are counted from 1.")
            window = schedule[step]
            self.schedule[step] = window if callable(window) else checked_window(window, self._length)
        parameters = set(model.parameters())
        if optimizer is not None and not any(
            p in parameters for group in optimizer.param_groups for p in group["params"]
        ):
            raise StreamlineError(
                f"This {type(optimizer).__name__} has no parameter of this {type(model).__name__}: it belongs to "
                "another model, or updates copies of the parameters (DeepSpeed, master weights). Create the optimizer "
                "from the parameters of this model."
            )
        self._try_windows()
        self._named = len(history)  # surgeries committed when the names of the optimizer's parameters were recorded
        if self._insertion is not None and optimizer is not None:
            follow_names(optimizer, model)

    @property
    def done(self) -> tuple[Removal, ...]:
        """Return the removals of this training run so far, including those before it was resumed."""
        return tuple(self._done)

    def resume(self, steps: int) -> None:
        """Set the number of optimizer steps so far; by default the first `step` infers it.

        Parameters
        ----------
        steps : int
            0 at the start of training.

        Raises
        ------
        StreamlineError
            If the model does not belong to this step: an earlier removal is missing, a later removal was already made,
            or `steps` is 0 and the model was changed since the start of training.
        """
        steps = operator.index(steps)
        past = {step: window for step, window in self.schedule.items() if step <= steps}
        removals = {removal.step: removal for removal in self._done}
        for step, window in past.items():
            if step not in removals:
                raise StreamlineError(
                    f"{steps} steps are done, and the schedule removes blocks after step {step}, but this "
                    f"{type(self.model).__name__} of {len(self._numbers)} blocks has no record of this removal. "
                    "Expected the model of the checkpoint: weights of a shortened model in a model with all blocks end "
                    "up in the wrong blocks. Load it with from_pretrained(checkpoint). Save a module without a "
                    "configuration with streamline_hooks.save and load it with load(folder, into=...), which keep the "
                    "record; or give a schedule of the remaining removals in the current numbering, and count the "
                    "steps from here."
                )
            if isinstance(window, range) and removals[step].blocks != tuple(window):
                raise StreamlineError(
                    f"According to the record of this model, the blocks {_listed(removals[step].blocks)} were removed "
                    f"after step {step} of {self.run!r}; the schedule removes {_listed(window)}. Give the schedule "
                    "with which the training run was started."
                )
            self._require_same_replacement(removals[step])
        early = sorted(set(removals) - set(past))
        if early or (self._resumed and not steps):
            lost = f"lost the blocks scheduled after step {early[0]}" if early else "was changed since the start"
            raise StreamlineError(
                f"{steps} steps are done, but according to its record this model already {lost} of {self.run!r}. "
                "Expected the model of the checkpoint that has this step count. Load that model with from_pretrained, "
                "or give a new training run another name: run=..."
            )
        self._at = steps

    def step(self, n: int) -> Removal | None:
        """Remove the window scheduled after an optimizer step. Call this after each step.

        Parameters
        ----------
        n : int
            Number of optimizer steps so far, 1 after the first step.

        Returns
        -------
        Removal or None
            None if no removal is scheduled after this step.

        Raises
        ------
        StreamlineError
            If `n` is not larger than in the previous call, if a removal was skipped, or if the model is wrapped,
            compiled, inside an open surgeon or does not belong to this step (see `resume`).
        UnsupportedSurgery
            If the window cannot be removed or committed. The model and the optimizer are then unchanged.
        """
        n = operator.index(n)
        if self._at is None:
            self.resume(n - 1)
        history = self._marked_history(find_stack(self.model, self._stack_path))
        assert self._at is not None
        if self._insertion is not None and self.optimizer is not None and self._named != len(history):
            record_names(self.optimizer, self.model)  # another surgery has renamed parameters
            self._named = len(history)
        if n <= self._at:
            raise StreamlineError(
                f"step({n}) was called after step({self._at}). Expected the number of optimizer steps so far, which "
                "increases. Create a new ProgressiveRemoval for a new training run."
            )
        missed = [step for step in self.schedule if self._at < step < n]
        if missed:
            raise StreamlineError(
                f"step({n}) was called after step({self._at}), which skips the removal scheduled after step "
                f"{missed[0]}. Expected a call after each optimizer step. Call step() in every iteration."
            )
        removed = self._remove(n, self.schedule[n]) if n in self.schedule else None
        self._at = n
        return removed

    def _follow(self) -> None:
        """Map each current block to its number at the start of training, from all committed surgeries."""
        stack = find_stack(self.model, self._stack_path)
        self._numbers: list[int | None] = list(range(self._length))
        for plan in map(SurgeryPlan.from_dict, self._marked_history(stack)[self._start :]):
            _require_length(self._numbers, plan.old_length)
            self._numbers = [None if slot.source is None else self._numbers[slot.source] for slot in plan.slots]
        _require_length(self._numbers, len(stack))

    def _marked_history(self, stack: BlockStack) -> list[dict[str, Any]]:
        """Return the committed surgeries, and mark the first surgery since the start with the name of the run."""
        history = _history_of(stack)
        if self._start < _start_of(history, self.run):
            first = history[self._start]
            first[_FIRST] = [*first.get(_FIRST, ()), self.run]
        return history

    def _remove(self, n: int, window: RemovalWindow) -> Removal:
        self._follow()
        present = self._present(window) if isinstance(window, range) else window(self.model)
        chosen = checked_window(present, len(self._numbers))
        before = _names(self.model)
        note: dict[str, Any] = {"run": self.run, "step": n, "blocks": [self._numbers[k] for k in chosen]}
        peers: Mapping[nn.Parameter, nn.Parameter] = {}
        repair = self._insertion.fitted(self.model, self._stack_path, chosen, n) if self._insertion else None
        with LayerSurgeon(self.model, self._stack_path) as surgeon:
            if repair is None or self._insertion is None:
                surgeon.remove(chosen)
            else:
                peers = self._insert(surgeon, chosen, repair.replacement_module)
                note |= {
                    "replacement": self._insertion.config.seeded(n).to_dict(),
                    "batches": self._insertion.digest,
                    "removal_error": repair.removal_error,
                    "repaired_error": repair.repaired_error,
                }
            self._refuse_new_parameters({*before, *peers})
            plan = surgeon.commit(**{_NOTE: note})
        removal = _recorded_removal({_NOTE: note, **plan.to_dict()})
        self._done.append(removal)
        self._digests[n] = note.get("batches")
        if self.optimizer is not None:
            left = _names(self.model)
            add_parameters(self.optimizer, peers, left)
            drop_parameters(self.optimizer, [parameter for parameter in before if parameter not in left])
            rename_parameters(self.optimizer, before, left)
            if self._insertion is not None:
                record_names(self.optimizer, self.model)
                self._named += 1
        return removal

    def _insert(
        self, surgeon: LayerSurgeon, window: range, module: WindowReplacement
    ) -> Mapping[nn.Parameter, nn.Parameter]:
        """Insert a replacement into the model; return its parameters, each with a removed one whose group it joins."""
        assert self.optimizer is not None
        if module is None:
            surgeon.remove(window)
            return {}
        if not isinstance(module, nn.Module) or any(
            p.is_floating_point() and not p.requires_grad for p in module.parameters()
        ):
            state = "has frozen weights, which a checkpoint does not record"
            if not isinstance(module, nn.Module):
                state = "changes weights of blocks that stay, to which the optimizer's state would not belong any more"
            raise UnsupportedSurgery(
                f"{type(module).__name__} cannot be inserted during training: it {state}. Choose another kind of "
                "replacement, such as LinearConfig().",
                "replacement",
            )
        stack = surgeon.stack
        if is_spliced(stack, module):
            replacement_config(module)  # raises if a checkpoint could not be loaded
        originals = {k: stack[k] for k in window}
        require_in_optimizer(self.optimizer, originals)
        removed = [parameter for block in originals.values() for parameter in block_parameters(block).values()]
        excluded = norms_and_biases(self.model)
        insert_replacement(surgeon, window, module)
        blocks = (
            () if is_spliced(stack, module) else tuple(module) if isinstance(module, InheritedBlocks) else (module,)
        )
        copied = {
            parameter: original.get(name)
            for block, original in zip(blocks, (dict(o.named_parameters()) for o in originals.values()), strict=False)
            for name, parameter in block.named_parameters()
        }
        new = {parameter: copied.get(parameter) for parameter in module.parameters() if parameter.requires_grad}
        return choose_peers(self.optimizer, removed, new, excluded | norms_and_biases(module))

    def _present(self, window: range) -> list[int]:
        """Return the current numbers of the blocks of a window."""
        removed = [k for k in window if k not in self._numbers]
        if removed:
            raise StreamlineError(
                f"Cannot remove blocks {_listed(window)} (numbered as at the start of training): {_listed(removed)} "
                "were already removed, by hand or by an earlier entry of the schedule. Give disjoint windows."
            )
        return [self._numbers.index(k) for k in window]

    def _try_windows(self) -> None:
        """Remove all remaining windows of the schedule in order, and restore the model."""
        completed_steps = {removal.step for removal in self._done}
        before, inserted = list(self.model.parameters()), set[nn.Parameter]()
        with LayerSurgeon(self.model, self._stack_path) as surgeon:
            for step, window in self.schedule.items():
                if step in completed_steps or not isinstance(window, range):
                    continue
                present = self._present(window)
                hazards = surgeon.check(present)
                if hazards:
                    reasons = "; ".join(str(hazard).rstrip(".") for hazard in hazards)
                    raise UnsupportedSurgery(
                        f"{describe_blocks(window).capitalize()} cannot be removed: {reasons}. Choose other blocks.",
                        hazards[0].cause,
                    )
                if self._insertion is None:
                    surgeon.remove(present)
                    peers: Mapping[nn.Parameter, nn.Parameter] = {}
                else:
                    module = self._insertion.unfitted(surgeon.stack, checked_window(present, len(surgeon.stack)))
                    peers = self._insert(surgeon, checked_window(present, len(surgeon.stack)), module)
                inserted |= set(peers)
                self._refuse_new_parameters({*before, *inserted})

    def _require_same_replacement(self, removal: Removal) -> None:
        """Raise if the record of a removal has another replacement or other batches than this object."""
        insertion = self._insertion
        config = None if insertion is None else insertion.config.seeded(removal.step)
        digest = None if insertion is None else insertion.digest
        if removal.replacement != config:
            raise StreamlineError(
                f"According to the record of this model, the blocks removed after step {removal.step} of {self.run!r} "
                f"were replaced by {removal.replacement!r}, and replacement={config!r} was given. Give the replacement "
                "with which the training run was started."
            )
        if self._digests.get(removal.step) != digest:
            raise StreamlineError(
                f"According to the record of this model, the replacement after step {removal.step} of {self.run!r} was "
                "fitted on other batches than fit and held_out. Expected the batches with which the training run was "
                "started, so that the resumed run equals an uninterrupted one. Pass them in the same order."
            )

    def _refuse_new_parameters(self, before: Collection[nn.Parameter]) -> None:
        known = set(before)
        new = [name for name, parameter in self.model.named_parameters() if parameter not in known]
        if new and self.optimizer is not None:
            raise UnsupportedSurgery(
                f"Blocks of {type(self.model).__name__} cannot be removed during training: {' and '.join(new)} would "
                "become new parameters without the parts of these blocks, and the optimizer does not have them. Remove "
                "the blocks before training.",
                "per-layer-embeddings",
            )


@dataclass(frozen=True)
class _Insertion:
    """The config of the replacements, and the batches on which they are fitted."""

    config: ReplacementConfig
    fit: Batches
    held_out: Batches
    digest: str

    def fitted(self, model: nn.Module, stack: str, window: range, step: int) -> Repair:
        """Fit the replacement of a window of the current model, without drawing global random numbers."""
        (repair,) = fit_windows(
            model, [window], self.config.seeded(step), self.fit, self.held_out, stack=stack, probe=self._probe()
        )
        return repair

    def unfitted(self, stack: BlockStack, window: range) -> WindowReplacement:
        """Return a new replacement that is not fitted."""
        return self.config.build(stack, window, probe=self._probe())

    def _probe(self) -> Batch | Tensor | None:
        """Return a batch without padding, if there is any."""
        for batch in self.fit:
            mask = None if isinstance(batch, Tensor) else padding_mask(batch)
            if not isinstance(mask, Tensor) or bool(mask.all()):
                return batch
        return None


def _insertion(
    config: ReplacementConfig | None, fit: Batches | None, held_out: Batches | None, optimizer: Optimizer | None
) -> _Insertion | None:
    """Validate the arguments of a replacement; return None for plain removal."""
    if config is None or type(config) is NoneConfig:
        return None
    if fit is None or held_out is None or optimizer is None:
        missing = [n for n, v in (("optimizer", optimizer), ("fit", fit), ("held_out", held_out)) if v is None]
        raise StreamlineError(
            f"replacement={config!r} was given without {' and '.join(missing)}. Expected batches on which the "
            "replacement is fitted, and the optimizer that trains it. Pass all of optimizer, fit and held_out."
        )
    if isinstance(config, (FoldedConfig, ScaleConfig)):
        raise UnsupportedSurgery(
            f"replacement={config!r} cannot be used during training: it changes weights of blocks that stay, to which "
            "the optimizer's state would not belong any more. Choose another kind, such as LinearConfig().",
            "replacement",
        )
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise UnsupportedSurgery(
            f"replacement={config!r} was given in a run of {distributed.get_world_size()} ranks. Expected one rank, "
            "because the same replacement must start on every rank. Train on one device, or remove without a "
            "replacement.",
            "distributed",
        )
    return _Insertion(config, fit, held_out, batches_digest([*fit, *held_out]))


def _recorded_removal(entry: Mapping[str, Any]) -> Removal:
    """Return the removal that an entry of a model's history describes."""
    note, plan = entry[_NOTE], SurgeryPlan.from_dict(dict(entry))
    config = ReplacementConfig.from_dict(note["replacement"]) if note.get("replacement") else None
    errors = note.get("removal_error"), note.get("repaired_error")
    return Removal(note["step"], tuple(note["blocks"]), plan, config, *errors)


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _listed(blocks: Iterable[int | None]) -> str:
    return ", ".join("new" if k is None else str(k) for k in blocks)


def _history_of(stack: BlockStack) -> list[dict[str, Any]]:
    """Return the surgeries committed on a stack, from the model's configuration or from a plain module."""
    depth = saved_model_depth(stack)
    if depth is None:
        history = plain_history(stack.model)
    else:
        model: Any = stack.ancestors[depth]
        history = (getattr(getattr(model, "config", None), "streamline_hooks", None) or {}).get("history", [])
    return [entry for entry in history if _same_stack(entry["stack"], stack.path)]


def _same_stack(path: str, other: str) -> bool:
    """Whether two paths, relative to different ancestors, name the same stack."""
    return f".{path}".endswith(f".{other}") or f".{other}".endswith(f".{path}")


def _start_of(history: Sequence[dict[str, Any]], run: str) -> int:
    """Return the number of surgeries committed before a training run; all if the run is not recorded."""
    return next(
        (k for k, entry in enumerate(history) if _belongs_to_run(entry, run) or run in entry.get(_FIRST, ())),
        len(history),
    )


def _belongs_to_run(entry: dict[str, Any], run: str) -> bool:
    return bool((entry.get(_NOTE) or {}).get("run") == run)


def _require_length(numbers: Sequence[int | None], present: int) -> None:
    if len(numbers) != present:
        raise StreamlineError(
            f"According to the surgeries committed since the start of training this model has {len(numbers)} blocks, "
            f"but {present} were found. Change blocks only with LayerSurgeon and commit() on the model given to "
            "ProgressiveRemoval, and load a shortened model with from_pretrained(checkpoint)."
        )
