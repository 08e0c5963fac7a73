"""The student: the model with its replacements and healed blocks; it usually shares all other weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamline_hooks.core import Batch, StreamlineError, describe_blocks
from streamline_hooks.distillation.weight_scale import relative_rms, relative_rms_of_block
from streamline_hooks.modeling import BlockStack, Task, find_stack, keep_4_bit_layout
from streamline_hooks.recording import ForwardStopped, HiddenStateRecorder, RecordingConfig
from streamline_hooks.repair import FoldedMap, ScaleFactor, WindowReplacement, insert_replacement
from streamline_hooks.surgery import (
    AFTER,
    BEFORE,
    COPIED_FROM,
    Head,
    LayerSurgeon,
    lm_head_of,
    resume,
    set_splices,
    snapshot_splices,
    spliced,
)

if TYPE_CHECKING:
    from streamline_hooks.distillation.teacher_cache import TeacherCache


class Student:
    """A model with the replacements and copies of remaining blocks that are trained.

    The model is changed only inside the context `applied`; outside it is the original. One set of weights therefore
    serves as teacher and as student. Both run on the same hidden states from the student's first changed block on.

    Parameters
    ----------
    model : torch.nn.Module
        The original model.
    replacement_modules : sequence of (range, WindowReplacement)
        Windows and their replacements, see `insert_replacement`.
    copies : mapping of int to torch.nn.Module, optional
        Copies of remaining blocks to train, by index; the teacher keeps the originals. See `HealingConfig`.
    outside : mapping of str to torch.nn.Module, optional
        Copies of modules outside the stack to train, such as the LM head, by path.
    rate : float
        Learning rate of the copies as a fraction of that of the replacements; default 1.0.
    stack : str, optional
        Path of the block stack, see `find_stack`.
    task : Task, optional
        Task whose outputs are compared; by default see `Task.of`.
    teacher : torch.nn.Module, optional
        Another model of the same vocabulary as teacher, such as the model before an earlier surgery; by default the
        model itself. It is not changed.

    Attributes
    ----------
    teacher_cache : TeacherCache or None
        The teacher's states on all batches of `train`, shared by several training runs, see `cache_teacher_states`.
        None, the default, lets each run cache them.

    Raises
    ------
    StreamlineError
        If there is nothing to train, windows touch each other, a trained module shares weights with the original or
        another trained module, a block to train is offloaded, or the teacher has another vocabulary.

    Examples
    --------
    >>> from streamline_hooks.replacements import LinearReplacement
    >>> from streamline_hooks.testing import tiny_model
    >>> student = Student(tiny_model("llama"), [(range(2, 4), LinearReplacement(32))])
    >>> student.start, sorted(student.parameters())
    (2, ['2-3.0.projection.weight'])
    """

    compares_states: ClassVar[bool] = True
    """Whether a loss may compare the hidden states after the windows."""
    settings: tuple[str, ...] = ()
    """Further settings that determine a training run; an interrupted run is resumed only if they are the same."""

    def __init__(
        self,
        model: nn.Module,
        replacement_modules: Sequence[tuple[range, WindowReplacement]],
        *,
        copies: Mapping[int, nn.Module] | None = None,
        outside: Mapping[str, nn.Module] | None = None,
        rate: float = 1.0,
        stack: str | None = None,
        task: Task | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.teacher = model if teacher is None else teacher
        self.teacher_cache: TeacherCache | None = None
        self._task = task
        self.stack = find_stack(model, stack)
        self.replacement_modules = sorted(replacement_modules, key=lambda pair: pair[0].start)
        self.copies = dict(sorted((copies or {}).items()))
        self.outside = dict(outside or {})
        self.rate = rate
        if not (self.replacement_modules or self.copies or self.outside):
            raise StreamlineError(
                "There is nothing to train. Expected a window with a replacement, or copies of blocks. Pass one."
            )
        _require_gaps(self.windows)
        self._require_one_vocabulary()
        self._require_separate_weights()
        self._require_weights_in_memory()
        for root in (model, self.teacher, *self.copies.values(), *self.outside.values()):
            keep_4_bit_layout(root)  # gradients pass these weights
        self.training = True
        first = [
            window.start - isinstance(replacement_module, FoldedMap)
            for window, replacement_module in self.replacement_modules
        ]
        self.start = min([*first, *self.copies, len(self.stack) - 1])
        with self.applied():
            pass  # fills self.modules

    @property
    def task(self) -> Task:
        """The task whose outputs are compared."""
        return self._task or Task.of(self.model)

    @property
    def teacher_stack(self) -> BlockStack:
        """Block stack of the teacher."""
        return self.stack if self.teacher is self.model else find_stack(self.teacher, self.stack.path)

    @property
    def windows(self) -> list[range]:
        """Removed windows."""
        return [window for window, _ in self.replacement_modules]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return {
            f"{path}.{number}.{name}": parameter
            for path, modules in self.modules.items()
            for number, module in enumerate(modules)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def buffers(self) -> dict[str, Tensor]:
        """Return the persistent buffers of the trained modules by name."""
        return {
            f"{path}.{number}.{name}": buffer
            for path, modules in self.modules.items()
            for number, module in enumerate(modules)
            for name, buffer in _persistent_buffers(module).items()
        }

    def learning_rate_factor(self, name: str, scale_parameter: bool = False) -> float:
        """Return the factor of the learning rate for a parameter: `rate` for copies, 1 for replacements.

        With `scale_parameter`, see `DistillationConfig`, the factor of a matrix is multiplied by a root mean square
        divided by 0.2: of the matrix itself in copies and inherited blocks, and the median of the matrices of block
        `start` in new modules. The factors of vectors and adapters are not multiplied.

        Raises
        ------
        StreamlineError
            If block `start` has no matrix whose values can be read, because of its quantization.
        """
        parameter = self.parameters()[name]
        copied = {*map(str, self.copies), *self.outside}
        path, module = next(
            (path, module)
            for path, modules in self.modules.items()
            for number, module in enumerate(modules)
            if name.startswith(f"{path}.{number}.")
        )
        factor = self.rate if path in copied else 1.0
        if not scale_parameter or parameter.ndim < 2 or "lora_" in name:
            return factor
        if path in copied or COPIED_FROM in vars(module):
            return factor * relative_rms(parameter)
        return factor * self._rms_of_first_block

    @cached_property
    def _rms_of_first_block(self) -> float:
        return relative_rms_of_block(self.stack[self.start])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Turn the model into the student until the context ends."""
        with ExitStack() as exits:
            surgeon = exits.enter_context(LayerSurgeon(self.model, self.stack, probe=False))
            self.apply(surgeon)
            exits.enter_context(self._outside_applied())
            self.modules |= {path: [module] for path, module in self.outside.items()}
            self._ends = self._blocks_after_windows()
            for modules in self.modules.values():
                for module in modules:  # the surgeon has set the mode of the surrounding blocks
                    module.train(self.training)
            yield

    @contextmanager
    def _outside_applied(self) -> Iterator[None]:
        """Exchange the trained modules outside the stack until the context ends."""
        with ExitStack() as exits:
            for path, module in self.outside.items():
                exits.callback(self.model.set_submodule, path, self.model.get_submodule(path))
                self.model.set_submodule(path, module)
            yield

    def apply(self, surgeon: LayerSurgeon) -> None:
        """Insert replacements and copies of blocks; the surgeon's plan counts copied blocks as removed.

        To commit a trained student, use `merge`, `insert_replacement` and `copy_weights_to_model` instead.
        """
        self.modules: dict[str, list[nn.Module]] = {}
        for window, replacement_module in self.replacement_modules:
            self.modules[f"{window.start}-{window.stop - 1}"] = insert_replacement(surgeon, window, replacement_module)
        for k, block in self.copies.items():
            self.modules[str(k)] = [surgeon.exchange(k, block)]

    def merge(self) -> None:
        """Merge the adapters into the weights of the copies.

        Raises
        ------
        StreamlineError
            If the weights are quantized; see `add_adapters_to`.
        """
        for block in self.copies.values():
            merge_adapters(block)

    def add_adapters_to(self, model: nn.Module) -> None:
        """Add the trained adapters to the weights of another model, before a surgeon removes the windows.

        Use it after training on quantized weights, with the same model in full precision. Insert the replacements
        afterwards with `insert_replacement`.

        Parameters
        ----------
        model : torch.nn.Module
            Model of the same architecture with all blocks, which is changed.

        Raises
        ------
        StreamlineError
            If its weights are quantized, offloaded or do not have the shapes of the adapters, a copy of a block has no
            adapters, a replacement is part of a block (folded, scale), or modules outside the blocks are trained.
        """
        inside = [m for _, m in self.replacement_modules if isinstance(m, (FoldedMap, ScaleFactor))]
        if inside:
            raise StreamlineError(
                f"The replacement {type(inside[0]).__name__} is part of a block that is trained, so its adapters "
                "do not fit the original weights. Expected a replacement between the blocks. Use merge and "
                "copy_weights_to_model, or another replacement."
            )
        if self.outside:
            raise StreamlineError(
                f"The student trains {', '.join(self.outside)} outside the blocks. Expected adapters only. Train "
                "without head, or use merge and copy_weights_to_model."
            )
        blocks = find_stack(model, self.stack.path)
        if len(blocks) != len(self.stack):
            raise StreamlineError(
                f"The model has {len(blocks)} blocks. Expected the {len(self.stack)} of the student's model, because "
                "the adapters belong to blocks by their number. Add the adapters before removing blocks."
            )
        updates = []
        for k, duplicate in self.copies.items():
            adapters = adapters_of(duplicate)
            if not adapters:
                raise StreamlineError(
                    f"The copy of block {k} has no adapters. Expected healing with method='lora'. Use "
                    "copy_weights_to_model."
                )
            for path, layer in adapters:
                target: Any = blocks[k].get_submodule(path)
                weight = target.weight
                deltas = [layer.get_delta_weight(name) for name in layer.active_adapters]
                if isinstance(target, Conv1D) != layer.fan_in_fan_out:  # bitsandbytes turns Conv1D into Linear
                    deltas = [delta.T for delta in deltas]
                if weight.is_meta:
                    raise StreamlineError(
                        f"{path} of block {k} is offloaded, so nothing can be added to it. Expected weights in memory. "
                        "Load the model without offloading."
                    )
                if not weight.is_floating_point() or weight.shape != deltas[0].shape:
                    raise StreamlineError(
                        f"{path} of block {k} has weights of dtype {weight.dtype} and shape {tuple(weight.shape)}. "
                        f"Expected floating-point weights of shape {tuple(deltas[0].shape)}. Pass the model in full "
                        "precision, with all its blocks."
                    )
                updates.append((weight, deltas))
        with torch.no_grad():
            for weight, deltas in updates:
                for delta in deltas:
                    weight.add_(delta.to(weight.device, weight.dtype))

    def _require_weights_in_memory(self) -> None:
        """Raise if the trained weights of a copy cannot be written back, because the originals are offloaded."""
        originals = {f"Block {k}": self.stack[k] for k in self.copies}
        originals |= {path: self.model.get_submodule(path) for path in self.outside}
        for name, module in originals.items():
            if any(parameter.is_meta for parameter in module.parameters()):
                raise StreamlineError(
                    f"{name} is offloaded, so its trained weights cannot be written back. Expected blocks in memory "
                    "for healing. Load the model without offloading, heal other blocks, or train the replacement alone."
                )

    def copy_weights_to_model(self) -> None:
        """Copy the trained (and merged) weights of the copies into the model.

        Raises
        ------
        StreamlineError
            If a replacement is part of a block (folded, scale) and its window is not removed yet. The trained weights
            contain the replacement, which `insert_replacement` would apply again.
        """
        inside = [m for _, m in self.replacement_modules if isinstance(m, (FoldedMap, ScaleFactor))]
        if inside and len(find_stack(self.model, self.stack.path)) == len(self.stack):
            raise StreamlineError(
                f"The trained weights contain the {type(inside[0]).__name__}, which inserting it would apply again. "
                "Expected a model without the windows. Call insert_replacement and commit first."
            )
        pairs = [(self.stack[k], duplicate) for k, duplicate in self.copies.items()]
        pairs += [(self.model.get_submodule(path), duplicate) for path, duplicate in self.outside.items()]
        with torch.no_grad():
            for module, duplicate in pairs:
                # Includes modules that are spliced next to the block and have no copy.
                originals: dict[str, Tensor] = {**dict(module.named_parameters()), **_persistent_buffers(module)}
                for name, value in [*duplicate.named_parameters(), *_persistent_buffers(duplicate).items()]:
                    originals[name].copy_(value)

    @contextmanager
    def frozen_originals(self) -> Iterator[None]:
        """Freeze all other parameters of the model and of the teacher until the context ends."""
        trained_ids = {
            id(parameter) for modules in self.modules.values() for m in modules for parameter in m.parameters()
        }
        parameters = dict.fromkeys([*self.model.parameters(), *self.teacher.parameters()])
        frozen = [p for p in parameters if p.requires_grad and id(p) not in trained_ids]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def run(self, entrance: Tensor, batch: Batch | Tensor, *, logits: bool, states: bool) -> tuple[Any, list[Tensor]]:
        """Run the student from block `start` on the states `entrance` of shape (batch, tokens, features).

        `batch` provides masks and positions. Return the model's output (None without `logits`) and the states after
        each window (none without `states`). Without `logits` no block after the last window runs.
        """
        output, _, window_states = self._run(entrance, batch, logits=logits, states=states, to_exit=False)
        return output, window_states

    def run_to_exit(self, entrance: Tensor, batch: Batch | Tensor, *, states: bool) -> tuple[Tensor, list[Tensor]]:
        """Run the student up to its last block; return the output of that block, and the states after each window.

        The output has shape (batch, tokens, features). Select tokens with `Task.answers`, and pass them to the first
        function of `heads`.
        """
        _, state, window_states = self._run(entrance, batch, logits=False, states=states, to_exit=True)
        assert state is not None
        return state, window_states

    @contextmanager
    def heads(self) -> Iterator[tuple[Head, Head]]:
        """Yield two functions from outputs of the last block, (tokens, features), to logits.

        The first is of the student, with gradients, the second of the teacher, without. Each call runs one block more,
        to reach the modules after the blocks.
        """
        with ExitStack() as opened:
            head = opened.enter_context(lm_head_of(self.stack, graph=True))
            is_other = self.teacher is not self.model
            teacher_head = opened.enter_context(lm_head_of(self.teacher_stack, graph=True)) if is_other else head

            def own_head(states: Tensor) -> Tensor:
                with self._outside_applied():
                    return head(states)

            yield own_head, torch.no_grad()(teacher_head)

    def _run(
        self, entrance: Tensor, batch: Batch | Tensor, *, logits: bool, states: bool, to_exit: bool
    ) -> tuple[Any, Tensor | None, list[Tensor]]:
        """Return the model's output, the state after the last block, and the states after each window."""
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        if checkpointed and torch.is_grad_enabled():
            # A reentrant checkpoint builds no graph if its input does not require a gradient.
            entrance = entrance.detach().requires_grad_()
        states_in = entrance.clone()  # a replacement may modify its input in place
        with self.applied(), self._without_earlier_splices(), ExitStack() as exits:
            entering = [k for k, at_end in self._ends if not at_end]
            has_end = to_exit or (states and len(entering) < len(self._ends))
            records: list[HiddenStateRecorder] = []
            recorder_of = partial(
                HiddenStateRecorder, self.model, config=RecordingConfig(detach=False), stack=self.stack.path
            )
            if states and entering:
                records.append(recorder_of(entering, sites=["block.input"], stop=not (logits or has_end)))
            if has_end:
                records.append(recorder_of([-1], sites=["block.output"], stop=not logits))
            for recorder in records:
                exits.enter_context(recorder)
            try:
                output = resume(self.model, self.start, states_in, batch, stack=self.stack.path, before_splices=True)
            except ForwardStopped:
                output = None
            window_states = [
                next(iter(records[-1].outputs.values()))[0] if at_end else records[0].inputs[k][0]
                for k, at_end in (self._ends if states else ())
            ]
            state = next(iter(records[-1].outputs.values()))[0] if to_exit else None
        return (output if logits else None), state, window_states

    def original_answers(self, exit_: Tensor | None, batch: Batch | Tensor) -> Tensor:
        """Return the teacher's answers (`Task.answers`) for outputs of its last block, without a graph."""
        assert exit_ is not None
        with torch.no_grad():
            stack = self.teacher_stack
            output = resume(self.teacher, len(stack), exit_.clone(), batch, stack=stack.path)
        return self.task.answers(output, batch)

    @contextmanager
    def _without_earlier_splices(self) -> Iterator[None]:
        """Disable modules that earlier surgery inserted before block `start`; `entrance` has already passed them."""
        earlier = {id(module) for module in spliced(self.stack[self.start], BEFORE)}
        if not earlier:
            yield
            return
        current_blocks = find_stack(self.model, self.stack.path).blocks
        block, position = (
            (current_blocks[self.start], BEFORE) if self.start < len(current_blocks) else (current_blocks[-1], AFTER)
        )
        restore = snapshot_splices(block, position)
        set_splices(block, position, [module for module in spliced(block, position) if id(module) not in earlier])
        try:
            yield
        finally:
            restore()

    def _require_one_vocabulary(self) -> None:
        """Raise if teacher and model have vocabularies of different sizes."""
        models: list[Any] = [self.model, self.teacher]
        heads = [head() for model in models if callable(head := getattr(model, "get_output_embeddings", None))]
        sizes = [head.weight.shape[0] for head in heads if head is not None]
        if len(set(sizes)) > 1:
            raise StreamlineError(
                f"The teacher has {sizes[1]:,} tokens in its vocabulary, {type(self.model).__name__} has {sizes[0]:,}. "
                "Expected the same vocabulary. Pass the model from which this one was compressed."
            )

    def _require_separate_weights(self) -> None:
        """Raise if a trained module shares weights with the model or with another trained module."""
        modules = [
            replacement_module
            for _, replacement_module in self.replacement_modules
            if isinstance(replacement_module, nn.Module)
        ]
        original = set(self.model.parameters())
        used = set(original)
        for module in (*modules, *self.copies.values(), *self.outside.values()):
            parameters = {p for p in module.parameters() if p.is_floating_point()}  # quantized weights are not trained
            if parameters & used:
                reason = "shares weights with the original model" if parameters & original else "is used twice"
                raise StreamlineError(
                    f"The {type(module).__name__} to train {reason}. Expected a module with separate weights. Pass a "
                    "copy (copy.deepcopy)."
                )
            used |= parameters

    def _blocks_after_windows(self) -> list[tuple[int, bool]]:
        """Return, per window, the current index of the block after it and whether the window ends the stack."""
        current_blocks = list(find_stack(self.model, self.stack.path).blocks)
        ends = []
        for window in self.windows:
            if window.stop == len(self.stack):
                ends.append((len(current_blocks), True))
                continue
            duplicates = self.modules.get(str(window.stop))
            block = duplicates[0] if duplicates else self.stack[window.stop]
            ends.append((next(k for k, module in enumerate(current_blocks) if module is block), False))
        return ends


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers of a module by path."""
    return {
        f"{path}.{name}".lstrip("."): buffer
        for path, owner in module.named_modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and name not in owner._non_persistent_buffers_set
    }


def _require_gaps(windows: Sequence[range]) -> None:
    for window, next_window in pairwise(windows):
        if next_window.start <= window.stop:
            raise StreamlineError(
                f"The windows of {describe_blocks(window)} and of {describe_blocks(next_window)} have no block between "
                "them. Expected separate windows. Pass one window for both."
            )


def adapters_of(block: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers of a block with LoRA adapters, by path."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:  # without peft a block has no adapters
        return []
    return [(path, layer) for path, layer in block.named_modules() if isinstance(layer, BaseTunerLayer)]


def merge_adapters(block: nn.Module) -> None:
    """Merge the LoRA adapters of a block into new weights, which it does not share with the original."""
    adapters = [(path, layer, layer.get_base_layer()) for path, layer in adapters_of(block)]
    if quantized := [path for path, _, base in adapters if not base.weight.is_floating_point()]:
        raise StreamlineError(
            f"{quantized[0]} has quantized weights, into which an adapter cannot be merged without loss. Expected "
            "floating-point weights. Call Student.add_adapters_to with the model in full precision."
        )
    for path, layer, base in adapters:
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        layer.merge()
        block.set_submodule(path, base)
