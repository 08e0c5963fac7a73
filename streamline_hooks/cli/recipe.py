"""The config that the options of ``compress`` describe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from streamline_hooks.pipeline.config import CompressionConfig, DataConfig
    from streamline_hooks.repair import DistillationConfig
    from streamline_hooks.selection import SearchConfig, Target
    from streamline_hooks.task import Task

LEARNING_RATE, EPOCHS, VALIDATIONS = 1e-3, 1, 8  # those of DistillationConfig, which is slow to import


@dataclass(frozen=True)
class Recipe:
    """The options that say how blocks are found, replaced and trained, as they were written; empty if left out."""

    kind: str = ""
    preset: str = ""
    loss: str = ""
    heal: str = ""
    rounds: int | None = None
    epochs: float = EPOCHS
    validations: int = VALIDATIONS
    learning_rate: float | None = None
    autocast: bool = False
    search: str = ""
    criterion: str = ""
    repeated: float | None = None

    def config(
        self,
        *,
        remove: Target,
        data: DataConfig,
        keep: tuple[int, ...] = (),
        windows: int = 2,
        shortlist: int = 8,
        batch_size: int = 4,
        seed: int = 0,
        task: Task | None = None,
        stack: str | None = None,
    ) -> CompressionConfig:
        """Return the config that the options describe; what they leave out is the preset's, or the default.

        Raises
        ------
        StreamlineError
            If an option contradicts the preset, or has no effect because nothing is trained.
        """
        base = self._base()
        hardware = replace(base.hardware, batch_size=batch_size)
        return replace(
            base,
            remove=remove,
            search=search_config(self.search, self.criterion, base.search, windows, shortlist, keep),
            data=replace(data, repeated=base.data.repeated if self.repeated is None else self.repeated),
            distillation=base.distillation and self._distillation(base.distillation),
            hardware=replace(hardware, autocast="bfloat16") if self.autocast else hardware,
            rounds=base.rounds if self.rounds is None else self.rounds,
            seed=seed,
            task=task,
            stack=stack,
        )

    def _base(self) -> CompressionConfig:
        from streamline_hooks.cli.short_forms import parse_healing, parse_loss, parse_replacement
        from streamline_hooks.pipeline.config import CompressionConfig
        from streamline_hooks.pipeline.presets import PRESETS
        from streamline_hooks.repair import DistillationConfig

        if not self.preset:
            self._require_used("" if self.loss else "no --train says what for (such as kl)")
            rate = LEARNING_RATE if self.learning_rate is None else self.learning_rate
            return CompressionConfig(
                repair=parse_replacement(self.kind or "linear"),
                distillation=DistillationConfig(loss=parse_loss(self.loss), learning_rate=rate) if self.loss else None,
                healing=parse_healing(self.heal) if self.heal else None,
            )
        base = PRESETS[self.preset].config
        decided = {
            "--kind": self.kind,
            "--train": self.loss,
            "--heal": self.heal,
            "--learning-rate": self.learning_rate is not None,
            "--rounds": self.rounds is not None and base.rounds != 1,
        }
        if given := [name for name, there in decided.items() if there]:
            raise StreamlineError(
                f"--preset {self.preset} says what {' and '.join(given)} would; leave one of them out."
            )
        self._require_used("" if base.distillation else f"--preset {self.preset} trains nothing")
        return base

    def _distillation(self, base: DistillationConfig) -> DistillationConfig:
        if self.epochs != EPOCHS:
            base = replace(base, epochs=self.epochs)
        return replace(base, validations=self.validations) if self.validations != VALIDATIONS else base

    def _require_used(self, missing: str) -> None:
        """Raise if there are options of a training, and nothing is trained."""
        of_training = {
            f"--heal {self.heal}": self.heal,
            f"--rounds {self.rounds}": self.rounds not in (None, 1),
            "--epochs": self.epochs != EPOCHS,
            "--validations": self.validations != VALIDATIONS,
            "--learning-rate": self.learning_rate is not None,
            "--autocast": self.autocast,
        }
        if missing and (given := [name for name, there in of_training.items() if there]):
            raise StreamlineError(f"{' and '.join(given)}: this is of a training, and {missing}.")


def search_config(
    text: str,
    criterion: str,
    base: SearchConfig | None = None,
    windows: int = 2,
    shortlist: int = 8,
    keep: tuple[int, ...] = (),
) -> SearchConfig:
    """Return the search that the options describe; what is empty is that of `base`.

    Raises
    ------
    StreamlineError
        If there is no such search or criterion, or they do not go together.
    """
    from streamline_hooks.cli.short_forms import parse_criterion, parse_search
    from streamline_hooks.selection import WindowSearch

    base = base or WindowSearch()
    search = parse_search(text) if text else base
    options: dict[str, Any] = {"keep": keep, "shortlist": min(shortlist, search.most_selections or shortlist)}
    if search.kind == base.kind:
        options["criterion"] = base.criterion
    if criterion:
        options["criterion"] = parse_criterion(criterion)
    if hasattr(search, "windows"):
        options["windows"] = max(windows, int(search.bounds.get("windows", 1)))
    written = [part.partition("=")[0].strip() for part in text.partition(":")[2].split(",")]
    return replace(search, **{name: value for name, value in options.items() if name not in written})
