"""One object that describes a compression completely."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml

from streamline_hooks.core.config import Bound, Config, require_fields, require_plain
from streamline_hooks.core.files import atomic_file
from streamline_hooks.core.hardware_config import HardwareConfig
from streamline_hooks.errors import StreamlineError, UnsupportedSurgery
from streamline_hooks.repair import DistillationConfig, HealingConfig, LinearConfig, ReplacementConfig
from streamline_hooks.selection import SearchConfig, Target, WindowSearch
from streamline_hooks.task import Task

SCHEMA = 2
"""The version of the form in which configs are written."""


def _without_on_policy(values: dict[str, Any]) -> dict[str, Any]:
    """Drop the empty `distillation.on_policy` of schema 1; refuse one that is set."""
    distillation = values.get("distillation")
    if not isinstance(distillation, Mapping) or "on_policy" not in distillation:
        return values
    if distillation["on_policy"] is not None:
        raise StreamlineError(
            f"CompressionConfig: distillation.on_policy={distillation['on_policy']!r} is no longer supported. Expected "
            "null. Leave it out, and train the result with TRL as in examples/on_policy_distillation.py."
        )
    return {**values, "distillation": {name: v for name, v in distillation.items() if name != "on_policy"}}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _without_on_policy}
"""For each older version that can be read, a function that returns the values as the next version has them."""


@dataclass(frozen=True)
class DataConfig(Config):
    """How documents are divided into disjoint parts, and how much of each part is used.

    Batches, packed text and text that is divided already have sizes of their own; these fields are for documents.

    Attributes
    ----------
    sequence_length : int
        Tokens in a sequence. 512 is enough context for what a block does to the hidden state, and fits most models.
    calibration_tokens : int
        Tokens that windows are ranked on, and replacements fitted and trained on. The default, 80 sequences, is where
        the least-squares map of a model of 576 features stops improving (benchmarks/results/quality.md).
    fitting_tokens : int, optional
        Of the calibration tokens, the first ones, on which windows are ranked and replacements fitted, if distillation
        continues on all of them. By default all. For long trainings, whose text would take long to rank on.
    validation_tokens : int
        Tokens on which the shortlist is verified, and the best weights of a training are chosen. The default, 4,096,
        keeps both short; candidates are compared on the same tokens.
    test_tokens : int
        Tokens on which the result is measured. Nothing is chosen or fitted on them. The default, 12,288, measures a
        perplexity to about a percent.
    repeated : float
        Fraction of the sequences used for ranking and verifying whose second half repeats the first, so that blocks
        that copy from the context are kept. 0 by default: prose as it is.
    """

    bounds: ClassVar[Mapping[str, Bound]] = {
        "sequence_length": 2,
        "calibration_tokens": 2,
        "fitting_tokens": 2,
        "validation_tokens": 2,
        "test_tokens": 2,
        "repeated": "[0, 1]",
    }

    sequence_length: int = 512
    calibration_tokens: int = 41_000
    fitting_tokens: int | None = None
    validation_tokens: int = 4_096
    test_tokens: int = 12_288
    repeated: float = 0.0


@dataclass(frozen=True)
class EvaluationConfig(Config):
    """What is measured of the compressed model besides its loss on the test part.

    Attributes
    ----------
    speed : bool
        Time the original and the compressed model in turn, for a prompt and for further tokens. True by default: it
        takes seconds.
    generation : bool
        Let both models continue the same prompts and solve small generated problems, so that a collapse is reported in
        `CompressionResult.warnings`. True by default: perplexity alone does not show a collapse.

    Both are for causal language models in memory that are given a tokenizer; with other models and data, and block by
    block, nothing is timed and nothing is generated.
    """

    speed: bool = True
    generation: bool = True


@dataclass(frozen=True)
class CompressionConfig(Config):
    """Everything that decides what a compression does to a model.

    The same model, data and config give the same selection, metrics and weights, if `compress` is given the same
    teacher, profile and test texts too. Every checkpoint contains the config it was made with; `load` reads it there.

    Attributes
    ----------
    remove : Target, int or float
        How much to remove: a number of blocks, a fraction of them, or a `Target`. A quarter by default, the sparsity
        of the LLM-Streamline paper.
    repair : ReplacementConfig
        What replaces the removed blocks. A linear map by default: it is solved in closed form, in seconds.
    search : SearchConfig
        How the blocks are found. The least important window of consecutive blocks by default.
    data : DataConfig
        How much text is used for what.
    distillation : DistillationConfig, optional
        How the replacement is trained afterwards. By default it is not.
    healing : HealingConfig, optional
        Which of the blocks that stay are trained too. By default none; needs `distillation`.
    evaluation : EvaluationConfig
        What is measured of the result.
    hardware : HardwareConfig
        How the machine is used; it changes the result by rounding only.
    rounds : int
        Rounds in which the blocks are removed. After each the repaired model is trained and ranked again (IteRABRe,
        arXiv 2503.06291), on a part of the data of its own. 1 by default; more need `distillation`.
    train_until : float, optional
        Seconds after the start of the compression at which training ends, with its best weights so far. By default it
        makes all its steps. The result of a limited training depends on the speed of the machine.
    seed : int
        Seed of the division of the data, of random initial weights and of the order of training. 0 by default; a
        `seed` of `repair` or `distillation` takes its place there.
    task : Task, optional
        What the model is for. By default what its class says, see `Task.of`.
    stack : str, optional
        Path of the block stack, for models with several; see `find_stack`.

    Raises
    ------
    StreamlineError
        If a value is invalid, or two parts contradict each other.

    Examples
    --------
    >>> from streamline_hooks import CompressionConfig, DistillationConfig, SwiGLUConfig
    >>> config = CompressionConfig(remove=0.25, repair=SwiGLUConfig(), distillation=DistillationConfig({"kl": 1.0}))
    >>> CompressionConfig.from_yaml(config.to_yaml()) == config
    True
    >>> CompressionConfig.preset("best", remove=8).repair
    SwiGLUConfig(seed=None, width=None, norm=True, linear=True)
    """

    bounds: ClassVar[Mapping[str, Bound]] = {"rounds": 1}

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
    seed: int = 0
    task: Task | None = None
    stack: str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "remove", Target.of(self.remove))
        for one, how in ((self.repair, "register_replacement"), (self.search, "register_search")):
            if one.family is None or one.family.get(one.kind) is not type(one):
                raise StreamlineError(
                    f"CompressionConfig: {type(one).__name__} is not registered under kind={one.kind!r}, so that it "
                    f"could not be read again. Expected a registered class. Give it a kind and pass it to {how}."
                )
        require_plain(self)
        self.search.check(self.target, replacement=self.repair)
        if self.distillation is None:
            self._refuse_without_distillation()
        elif self.search.silences_branches:
            raise UnsupportedSurgery(
                f"CompressionConfig: the search {self.search.kind!r} silences attentions or MLPs, whose replacements "
                "are solved in closed form and not trained. Leave distillation out, or search for windows."
            )
        if self.train_until is not None and not self.train_until > 0:
            raise StreamlineError(
                f"CompressionConfig: train_until={self.train_until} leaves no time for training. Expected seconds "
                "above 0. Give more, or None for no limit."
            )
        if self.rounds > 1:
            self._check_rounds()

    @property
    def target(self) -> Target:
        """What `remove` stands for."""
        return Target.of(self.remove)

    def _refuse_without_distillation(self) -> None:
        given = {
            "healing": self.healing is not None,
            "rounds": self.rounds > 1,
            "train_until": self.train_until is not None,
            "data.fitting_tokens": self.data.fitting_tokens is not None,
            "hardware.autocast": self.hardware.autocast is not None,
            "hardware.state_dtype": self.hardware.state_dtype is not None,
        }
        if found := [name for name, there in given.items() if there]:
            raise StreamlineError(
                f"CompressionConfig: {' and '.join(found)} has no effect without a training. Expected a "
                "DistillationConfig beside it. Add distillation=DistillationConfig(), or leave it out."
            )

    def _check_rounds(self) -> None:
        assert self.distillation is not None
        if not self.target.counts_blocks:
            raise StreamlineError(
                f"CompressionConfig: rounds={self.rounds} cannot share the target {self.target}. Expected a number or "
                "a fraction of the blocks. Change remove, or use one round."
            )
        objective = self.distillation.objective
        if objective.needs_states:
            raise StreamlineError(
                f"CompressionConfig: the loss {objective} compares hidden states behind windows, which the original "
                f"has elsewhere after the first of {self.rounds} rounds. Compare logits: kl, reverse_kl or lm."
            )
        if self.train_until is not None:
            raise StreamlineError(
                f"CompressionConfig: train_until={self.train_until} ends one training, and each of {self.rounds} "
                "rounds has its own. Leave it out, or limit each with DistillationConfig(max_minutes=...)."
            )

    @classmethod
    def preset(cls, name: str, **fields: Any) -> CompressionConfig:
        """Return a recommended or published config.

        Parameters
        ----------
        name : str
            One of `PRESETS`, which gives the source of each: ``"best"``, ``"llm-streamline-ffn"``, ...
        **fields
            Fields to set differently, such as ``remove=8``.

        Raises
        ------
        StreamlineError
            If there is no such preset; the nearest one is suggested.
        """
        from streamline_hooks.pipeline.presets import PRESETS

        require_fields(cls, fields)
        return replace(PRESETS[name].config, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the schema version and all fields as values of JSON and YAML."""
        return {"schema": SCHEMA, **super().to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionConfig:
        """Build a config from what `to_dict` returned, of this or an older schema version.

        Fields that are left out have their defaults; without a version the present one is assumed.

        Raises
        ------
        StreamlineError
            If the version or a key is unknown, with the nearest known key, or a value is invalid.
        """
        if not isinstance(values, Mapping):
            raise StreamlineError(f"Got {values!r} as a config. Expected a mapping of fields to values. Write one.")
        given = dict(values)
        version = given.pop("schema", SCHEMA)
        while type(version) is not int or version != SCHEMA:
            if type(version) is not int or version not in UPGRADES:
                known = ", ".join(map(str, [*sorted(UPGRADES), SCHEMA]))
                raise StreamlineError(
                    f"schema={version!r} is unknown. Expected {known}. Read the config with the version of "
                    "streamline_hooks that wrote it, or a newer one."
                )
            given, version = UPGRADES[version](given), version + 1
        return super().from_dict(given)

    def to_yaml(self) -> str:
        """Return the config as YAML, with its schema version first."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> CompressionConfig:
        """Read YAML, of which JSON is a part; see `from_dict`.

        Raises
        ------
        StreamlineError
            If the text is no YAML, or as `from_dict`.
        """
        try:
            values = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise StreamlineError(
                f"The config is no YAML: {error}. Expected lines such as `remove: 0.25`. Correct it."
            ) from None
        return cls.from_dict({} if values is None else values)

    def save(self, path: str | Path) -> None:
        """Write the config to a file: JSON if its name ends in ``.json``, else YAML."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=2) + "\n" if path.suffix == ".json" else self.to_yaml()
        with atomic_file(path) as new:
            new.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CompressionConfig:
        """Read a config from a file that `save` wrote, or from a checkpoint.

        Parameters
        ----------
        path : str or Path
            A YAML or JSON file, or a folder with a compressed model.

        Raises
        ------
        StreamlineError
            If there is none, or as `from_dict`.
        """
        path = Path(path)
        if path.is_dir():
            return cls.from_dict(_recorded(path))
        if not path.is_file():
            raise StreamlineError(
                f"There is no file {path}. Expected a config in YAML or JSON, or a checkpoint folder. Correct the path."
            )
        try:
            return cls.from_yaml(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise StreamlineError(
                f"{path} is no text in UTF-8: {error}. Expected a config in YAML or JSON. Write it anew."
            ) from None


class _Loader(yaml.SafeLoader):
    """Reads ``1e-3`` as a number, as YAML 1.2 and Python do, and refuses a key that occurs twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]  # type: ignore[no-untyped-call]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise StreamlineError(
                f"The config has the key {twice[0]!r} twice. Expected each key once. Delete one of them."
            )
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Writes text that `_Loader` would read as a number in quotation marks."""


for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _recorded(folder: Path) -> dict[str, Any]:
    """Return the config in a checkpoint."""
    from streamline_hooks.checkpoint import read_history

    expected = "Expected a checkpoint that one call of `compress` wrote, with this version or a later one."
    try:
        found = [entry.get("config") for entry in read_history(folder)]
    except StreamlineError as error:
        raise StreamlineError(
            f"{folder} holds no config of a compression: {error} {expected} Name a file instead."
        ) from None
    if not all(isinstance(one, dict) and one == found[0] for one in found):
        told = sum(isinstance(one, dict) for one in found)
        raise StreamlineError(
            f"{folder} holds no config that describes it: {len(found)} surgeries, {told} with a config. {expected} "
            "Write the config by hand, or compress again."
        )
    return dict(found[0] or {})
