"""Define `CompressionConfig`, which describes a compression completely, and the configs it contains."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import yaml
from torch import nn

from streamline_hooks.checkpoint import read_history
from streamline_hooks.core import (
    Bound,
    Config,
    HardwareConfig,
    StreamlineError,
    UnsupportedSurgery,
    atomic_file,
    check_field_names,
    check_json_values,
    require_weights,
    validate_fields,
)
from streamline_hooks.distillation import DistillationConfig, HealingConfig, TrainingCallback
from streamline_hooks.evaluation import LossMeasure
from streamline_hooks.modeling import Task
from streamline_hooks.repair import LinearConfig, NoneConfig, ReplacementConfig
from streamline_hooks.selection import SearchConfig, Target, WindowSearch
from streamline_hooks.statistics import Profile

SCHEMA = 3
"""Schema version of saved configs."""


def _without_on_policy(values: dict[str, Any]) -> dict[str, Any]:
    """Drop the empty `distillation.on_policy` of schema 1; refuse one that is set."""
    distillation = values.get("distillation")
    if not isinstance(distillation, Mapping) or "on_policy" not in distillation:
        return values
    if distillation["on_policy"] is not None:
        raise StreamlineError(
            f"CompressionConfig: distillation.on_policy={distillation['on_policy']!r} is no longer supported. Expected "
            "null. Remove the field, and train the result with TRL as in examples/on_policy_distillation.py."
        )
    return {**values, "distillation": {name: v for name, v in distillation.items() if name != "on_policy"}}


def _with_renamed_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Rename `search.keep` and `data.repeated` of schema 2 to `search.protect` and `data.repeated_context`."""
    renamed = dict(values)
    for section, old, new in (("search", "keep", "protect"), ("data", "repeated", "repeated_context")):
        if isinstance(fields := renamed.get(section), Mapping):
            renamed[section] = {new if name == old else name: value for name, value in fields.items()}
    return renamed


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _without_on_policy, 2: _with_renamed_fields}
"""By older schema version, the function that converts the values to the next version."""


@dataclass(frozen=True)
class DataConfig(Config):
    """Sizes of the disjoint parts into which documents are split.

    The fields apply to documents only. Batches, packed text and a `TokenSplit` already have their sizes.

    Attributes
    ----------
    sequence_length : int
        Tokens per sequence. The default of 512 gives enough context to measure a block and fits most models.
    calibration_tokens : int
        Tokens for ranking windows and for fitting and training replacements. The default of 80 sequences suits a
        least-squares map of 576 features: with 100,000 instead of 30,000 tokens, the perplexity falls by another 1.5 %
        (benchmarks/results/curves.md). Wider models and training need more.
    fitting_tokens : int, optional
        Rank windows and fit replacements on this many of the first calibration tokens only; distillation uses all of
        them. It saves time if the training text is long. By default all calibration tokens.
    validation_tokens : int
        Tokens for verifying the shortlist and for choosing the best weights during training. All candidates are
        compared on the same tokens. The default of 4,096 keeps both steps short.
    test_tokens : int
        Tokens for measuring the result. Nothing is chosen or fitted on them. The default of 12,288 measures perplexity
        to about one percent.
    repeated_context : float
        Fraction of the ranking and verification sequences whose second half repeats the first. It makes the search keep
        blocks that copy from the context. 0 by default.

    Examples
    --------
    >>> from streamline_hooks import DataConfig
    >>> DataConfig(calibration_tokens=20_000).sequence_length
    512
    """

    bounds: ClassVar[Mapping[str, Bound]] = {
        "sequence_length": 2,
        "calibration_tokens": 2,
        "fitting_tokens": 2,
        "validation_tokens": 2,
        "test_tokens": 2,
        "repeated_context": "[0, 1]",
    }

    sequence_length: int = 512
    calibration_tokens: int = 41_000
    fitting_tokens: int | None = None
    validation_tokens: int = 4_096
    test_tokens: int = 12_288
    repeated_context: float = 0.0


@dataclass(frozen=True)
class EvaluationConfig(Config):
    """Optional measurements of the compressed model, in addition to its loss on the test part.

    Both apply to causal language models in memory that have a tokenizer. Other models are neither timed nor asked to
    generate.

    Attributes
    ----------
    speed : bool
        Time the prompt and the further tokens of the original and the compressed model in turn. True by default; it
        takes seconds.
    generation : bool
        Let both models continue the same prompts and solve small generated problems. A collapse, which perplexity does
        not show, is reported in `CompressionResult.warnings`. True by default.

    Examples
    --------
    >>> from streamline_hooks.pipeline import EvaluationConfig
    >>> EvaluationConfig(speed=False)
    EvaluationConfig(speed=False, generation=True)
    """

    speed: bool = True
    generation: bool = True


@dataclass(frozen=True, eq=False)
class RunOptions:
    """Options of one call of `compress` that are not saved: files, callbacks and existing objects.

    Attributes
    ----------
    overwrite : bool
        Replace an output folder that `save` wrote. Other non-empty folders are never replaced. False by default.
    resume : bool
        Continue an interrupted training run with the same arguments. After Ctrl-C it also needs ``overwrite=True``,
        because the best weights so far are in the output folder. The steps before training are repeated. False by
        default.
    checkpoint_file : str or Path, optional
        The training checkpoint, from which an interrupted run is resumed. By default ``OUTPUT.training``, next to the
        output folder; it is removed at the end.
    profile : Profile, optional
        A profile of the model, if it was measured before.
    teacher : torch.nn.Module, optional
        The original of a model that was already changed by surgery. It is the teacher of the training run and the
        reference of the measurements. Windows are verified against the given model. By default the model itself.
    test_texts : sequence of str, optional
        Documents for the test part. By default a part of the data. Only if the data are documents.
    callbacks : sequence of TrainingCallback
        Called before and after each training step and each validation.
    guarantee_data : dict of str to sequence, optional
        For each measure of `CompressionConfig.at_most` its documents or tasks, see `streamline_hooks.evaluation.
        guarantee`. They must be independent of all other data.

    Examples
    --------
    >>> from streamline_hooks import RunOptions
    >>> RunOptions(overwrite=True).resume
    False
    """

    overwrite: bool = False
    resume: bool = False
    checkpoint_file: str | Path | None = None
    profile: Profile | None = None
    teacher: nn.Module | None = None
    test_texts: Sequence[str] | None = None
    callbacks: Sequence[TrainingCallback] = ()
    guarantee_data: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.teacher is not None:
            require_weights(self.teacher, "RunOptions: teacher")


@dataclass(frozen=True)
class CompressionConfig(Config):
    """Configure a compression completely.

    The same model, data and config give the same selection, metrics and weights, if the teacher, profile and test texts
    of `RunOptions` are also the same. Every checkpoint contains its config, which `load` reads.

    Attributes
    ----------
    remove : Target, int or float
        How much to remove: a number of blocks, a fraction of the blocks, or a `Target`. By default a quarter, the
        sparsity of the LLM-Streamline paper (arXiv 2403.19135).
    repair : ReplacementConfig
        The replacement of the removed blocks. By default a linear map, which is solved in closed form within seconds.
    search : SearchConfig
        The search that selects the blocks. By default the least important window of consecutive blocks.
    data : DataConfig
        Sizes of the calibration, validation and test parts.
    distillation : DistillationConfig, optional
        How to train the replacement after it is fitted. By default it is not trained.
    healing : HealingConfig, optional
        Remaining blocks to train together with the replacement. By default none. Needs `distillation`.
    evaluation : EvaluationConfig
        Optional measurements of the result.
    hardware : HardwareConfig
        Batch size, precision and memory. Only `batch_size` changes the result by more than rounding, because it sets
        the number of training steps.
    rounds : int
        Number of rounds in which the blocks are removed. After each round the repaired model is trained and ranked
        again on another part of the data (IteRABRe, arXiv 2503.06291). 1 by default; more need `distillation`.
    train_until : float, optional
        Seconds after the start of the compression at which training stops and keeps the best weights so far. The result
        then depends on the speed of the machine. By default training is not limited.
    at_most : dict of str to float, optional
        Largest expected losses by measure, such as ``{"disagreement": 0.1}``; see `streamline_hooks.evaluation.
        guarantee`; the KL divergence of a token is clipped at 1 nat. A window of `remove` blocks is chosen as usual,
        and inside it windows of half, a quarter, ... of the blocks. The largest one whose losses are bounded by these
        values on `RunOptions.guarantee_data` is removed. If there is none, the compression raises an error. The
        original is copied for the comparison, and the estimate of a compression does not include it. By default nothing
        is bounded.
    delta : float
        Probability with which the losses may exceed `at_most`. 0.05 by default.
    seed : int
        Seed of the data split, of random initial weights and of the order of training batches. A `seed` of `repair` or
        `distillation` overrides it there. 0 by default.
    task : Task, optional
        The task of the model. By default it is derived from the model's class, see `Task.of`.
    stack : str, optional
        Path of the block stack, for models with several stacks; see `find_stack`.

    Raises
    ------
    StreamlineError
        If a field is invalid, or two fields contradict each other.

    Examples
    --------
    >>> from streamline_hooks import CompressionConfig, DistillationConfig, SwiGLUConfig
    >>> config = CompressionConfig(remove=0.25, repair=SwiGLUConfig(), distillation=DistillationConfig({"kl": 1.0}))
    >>> CompressionConfig.from_yaml(config.to_yaml()) == config
    True
    >>> CompressionConfig.preset("best", remove=8).repair
    SwiGLUConfig(seed=None, width=None, norm=True, linear=True)
    """

    bounds: ClassVar[Mapping[str, Bound]] = {"rounds": 1, "delta": "(0, 1)"}

    remove: Target | int | float = Target(fraction=0.25)
    repair: ReplacementConfig = LinearConfig()
    search: SearchConfig = WindowSearch()
    data: DataConfig = DataConfig()
    distillation: DistillationConfig | None = None
    healing: HealingConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    hardware: HardwareConfig = HardwareConfig()
    rounds: int = 1
    train_until: float | None = None
    at_most: Mapping[str, float] | None = None
    delta: float = 0.05
    seed: int = 0
    task: Task | None = None
    stack: str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "remove", Target.of(self.remove))
        for component, register in ((self.repair, "register_replacement"), (self.search, "register_search")):
            if component.family is None or component.family.get(component.kind) is not type(component):
                raise StreamlineError(
                    f"CompressionConfig: {type(component).__name__} is not registered under kind={component.kind!r}, "
                    "so a saved config could not be loaded. Expected a registered class. Set its kind and pass it to "
                    f"{register}."
                )
        check_json_values(self)
        if self.search.zeroes_branches and not (self.repair.replaces_branches or isinstance(self.repair, NoneConfig)):
            raise StreamlineError(
                f"CompressionConfig: repair={self.repair} has no effect, because the search {self.search.kind!r} "
                "removes attention or MLP branches, which only linear maps of full rank replace. Expected "
                "LinearConfig() or NoneConfig(). Change repair, or search for windows."
            )
        self.search.check(self.target, replacement=self.repair)
        if self.distillation is None:
            self._refuse_without_distillation()
        elif self.search.zeroes_branches:
            raise UnsupportedSurgery(
                f"CompressionConfig: the search {self.search.kind!r} zeroes attention or MLP branches, whose "
                "replacements are solved in closed form and not trained. Leave distillation out, or search for windows."
            )
        if self.train_until is not None and not self.train_until > 0:
            raise StreamlineError(
                f"CompressionConfig: train_until={self.train_until} leaves no time for training. Expected a number of "
                "seconds > 0. Increase it, or use None for no limit."
            )
        if self.rounds > 1:
            self._check_rounds()
        if self.at_most is not None:
            self._check_at_most(self.at_most)
        elif self.delta != CompressionConfig.delta:
            raise StreamlineError(
                f"CompressionConfig: delta={self.delta} has no effect without at_most. Expected both. Set at_most, or "
                "leave delta out."
            )

    @property
    def target(self) -> Target:
        """`remove` as a `Target`."""
        return Target.of(self.remove)

    def _refuse_without_distillation(self) -> None:
        is_set = {
            "healing": self.healing is not None,
            "rounds": self.rounds > 1,
            "train_until": self.train_until is not None,
            "data.fitting_tokens": self.data.fitting_tokens is not None,
            "hardware.autocast": self.hardware.autocast is not None,
            "hardware.state_dtype": self.hardware.state_dtype is not None,
        }
        if fields_set := [name for name, set_ in is_set.items() if set_]:
            raise StreamlineError(
                f"CompressionConfig: {' and '.join(fields_set)} has no effect without training. Expected a "
                "DistillationConfig as well. Add distillation=DistillationConfig(), or leave it out."
            )

    def _check_rounds(self) -> None:
        assert self.distillation is not None
        if not self.target.counts_blocks:
            raise StreamlineError(
                f"CompressionConfig: rounds={self.rounds} cannot divide the target {self.target}. Expected a number or "
                "a fraction of the blocks. Change remove, or use one round."
            )
        objective = self.distillation.objective
        if objective.needs_states:
            raise StreamlineError(
                f"CompressionConfig: the loss {objective} compares hidden states after windows, but after the first of "
                f"{self.rounds} rounds the boundaries of the original differ. Use a loss on logits: kl, reverse_kl or "
                "lm."
            )
        if self.train_until is not None:
            raise StreamlineError(
                f"CompressionConfig: train_until={self.train_until} limits one training run, but each of {self.rounds} "
                "rounds has a training run. Leave it out, or limit each run with DistillationConfig(max_minutes=...)."
            )

    def _check_at_most(self, limits: Mapping[str, float]) -> None:
        measures = get_args(LossMeasure)
        if not limits or not set(limits) <= set(measures) or not all(0 < value < 1 for value in limits.values()):
            raise StreamlineError(
                f"CompressionConfig: at_most={dict(limits)} was given. Expected values between 0 and 1 (the KL of a "
                f"token is clipped at 1 nat) for at least one of {', '.join(measures)}. Correct the names and values."
            )
        excluded = {
            "a distillation, as in the preset best,": self.distillation is not None,
            f"the target {self.target}": not self.target.counts_blocks,
            f"the search {self.search.kind!r}": self.search.number_of_windows != 1 or self.search.zeroes_branches,
        }
        if unsupported := [name for name, is_set in excluded.items() if is_set]:
            raise StreamlineError(
                f"CompressionConfig: at_most compares nested windows with closed-form replacements, but "
                f"{' and '.join(unsupported)} was given. Expected a number or a fraction of the blocks, one window, "
                "and no training. Compress without at_most, and call `guarantee` on the result."
            )

    @classmethod
    def preset(cls, name: str, **fields: Any) -> CompressionConfig:
        """Return a recommended or published config.

        Parameters
        ----------
        name : str
            A name in `PRESETS`, such as ``"best"`` or ``"llm-streamline-ffn"``. `Preset.source` names the paper.
        **fields
            Fields to override, such as ``remove=8``.

        Returns
        -------
        CompressionConfig

        Raises
        ------
        StreamlineError
            If the name is unknown; the error suggests the nearest name.
        """
        from streamline_hooks.pipeline.presets import PRESETS

        check_field_names(cls, fields)
        return replace(PRESETS[name].config, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the schema version and all fields as JSON values."""
        return {"schema": SCHEMA, **super().to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionConfig:
        """Build a config from the output of `to_dict`, also of an older schema version.

        Missing fields have their defaults. A missing version means the current version.

        Raises
        ------
        StreamlineError
            If the version or a key is unknown, or a value is invalid.
        """
        if not isinstance(values, Mapping):
            raise StreamlineError(f"Got {values!r} as a config. Expected a mapping of fields to values. Pass one.")
        remaining = dict(values)
        version = remaining.pop("schema", SCHEMA)
        while type(version) is not int or version != SCHEMA:
            if type(version) is not int or version not in UPGRADES:
                known = ", ".join(map(str, [*sorted(UPGRADES), SCHEMA]))
                raise StreamlineError(
                    f"schema={version!r} is unknown. Expected one of {known}. Load the config with the version of "
                    "streamline_hooks that wrote it, or with a newer version."
                )
            remaining, version = UPGRADES[version](remaining), version + 1
        return super().from_dict(remaining)

    def to_yaml(self) -> str:
        """Return the config as YAML, starting with the schema version."""
        text: str = yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False)
        return text

    @classmethod
    def from_yaml(cls, text: str) -> CompressionConfig:
        """Build a config from YAML or JSON text; see `from_dict`.

        Raises
        ------
        StreamlineError
            If the text is not valid YAML, or `from_dict` raises.
        """
        try:
            values = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise StreamlineError(
                f"The config is not valid YAML: {error}. Expected lines such as `remove: 0.25`. Correct the syntax."
            ) from None
        return cls.from_dict({} if values is None else values)

    def save(self, path: str | Path) -> None:
        """Write the config to a file, as JSON if the name ends in ``.json``, else as YAML."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=2) + "\n" if path.suffix == ".json" else self.to_yaml()
        with atomic_file(path) as new:
            new.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CompressionConfig:
        """Load a config from a file or from a checkpoint.

        Parameters
        ----------
        path : str or Path
            A YAML or JSON file, or the folder of a compressed model.

        Returns
        -------
        CompressionConfig

        Raises
        ------
        StreamlineError
            If the path contains no config, or `from_dict` raises.
        """
        path = Path(path)
        if path.is_dir():
            return cls.from_dict(_config_of_checkpoint(path))
        if not path.is_file():
            raise StreamlineError(
                f"There is no file {path}. Expected a YAML or JSON config, or a checkpoint folder. Correct the path."
            )
        try:
            return cls.from_yaml(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise StreamlineError(
                f"{path} is not UTF-8 text: {error}. Expected a YAML or JSON config. Save it as UTF-8."
            ) from None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML loader that reads ``1e-3`` as a number, as YAML 1.2 does, and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if duplicates := [key for key in keys if keys.count(key) > 1]:
            raise StreamlineError(
                f"The config has the key {duplicates[0]!r} twice. Expected each key once. Delete one of the two."
            )
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """YAML dumper that quotes strings that `_Loader` would read as numbers."""


for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _config_of_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the config stored in a checkpoint."""
    expected = "Expected a checkpoint of one call of `compress`."
    try:
        configs = [entry.get("config") for entry in read_history(folder)]
    except StreamlineError as error:
        raise StreamlineError(
            f"{folder} contains no config of a compression: {error} {expected} Pass a config file instead."
        ) from None
    if not all(isinstance(config, dict) and config == configs[0] for config in configs):
        count = sum(isinstance(config, dict) for config in configs)
        raise StreamlineError(
            f"{folder} contains no config that describes it: it records {len(configs)} surgeries, {count} with a "
            f"config. {expected} Write the config by hand, or compress again."
        )
    return dict(configs[0] or {})
