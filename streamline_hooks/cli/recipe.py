"""What the options of a compression come to: how blocks are found, what replaces them, and how that is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from streamline_hooks.repair import Healing, Preset, Training

LEARNING_RATE, VALIDATIONS, _KIND = 1e-3, 8, "linear"


@dataclass(frozen=True)
class Recipe:
    """What is to be done; each by the name that `compress` has for it."""

    kind: str
    training: Training | None
    healing: Healing | None
    rounds: int
    search: str
    criterion: str
    repeated: float


@dataclass(frozen=True)
class Asked:
    """The options, each by its own name; empty, or as they are by default, where they were left out."""

    kind: str = ""
    preset: str = ""
    objective: str = ""
    heal: str = ""
    on_policy: str = ""
    rounds: int | None = None
    epochs: float = 1
    validations: int = VALIDATIONS
    learning_rate: float | None = None
    autocast: bool = False
    search: str = ""
    criterion: str = ""
    repeated: float | None = None

    def recipe(self, seed: int) -> Recipe:
        """What they come to; how blocks are found is the preset's where nothing else was said.

        Raises
        ------
        StreamlineError
            If an option contradicts the preset, or does nothing, since nothing is trained.
        """
        from streamline_hooks.repair import Healing, Objective, Preset, Training, preset_named

        if not self.preset:
            self._require_used("" if self.objective else "no --train says what for (such as kl)")
            healing = Healing.parse(self.heal) if self.heal else None
            training = None
            if self.objective:
                rate = LEARNING_RATE if self.learning_rate is None else self.learning_rate
                training = Training(objective=Objective.parse(self.objective), learning_rate=rate)
            return self._found(Preset("", self.kind or _KIND, "", training, healing), seed)
        chosen = preset_named(self.preset)
        decided = {
            "--kind": self.kind,
            "--train": self.objective,
            "--heal": self.heal,
            "--learning-rate": self.learning_rate is not None,
            "--rounds": self.rounds is not None and chosen.rounds != 1,
        }
        if said := [name for name, there in decided.items() if there]:
            raise StreamlineError(
                f"--preset {self.preset} says what {' and '.join(said)} would; leave one of them out."
            )
        self._require_used("" if chosen.training else f"--preset {self.preset} trains nothing")
        return self._found(chosen, seed)

    def _found(self, chosen: Preset, seed: int) -> Recipe:
        from streamline_hooks.selection import SEARCHES

        search = self.search or chosen.search
        own = chosen.criterion if search == chosen.search else ""
        return Recipe(
            chosen.kind,
            chosen.training and self._of(chosen.training, seed),
            chosen.healing,
            self.rounds or chosen.rounds,
            search,
            self.criterion or own or SEARCHES[search].default_criterion,
            chosen.repeated if self.repeated is None else self.repeated,
        )

    def _of(self, training: Training, seed: int) -> Training:
        import torch

        from streamline_hooks.repair import OnPolicy

        return replace(
            training,
            on_policy=OnPolicy.parse(self.on_policy) if self.on_policy else None,
            epochs=self.epochs,
            validations=self.validations,
            autocast=torch.bfloat16 if self.autocast else None,
            seed=seed,
        )

    def _require_used(self, missing: str) -> None:
        """Raise if there are options of a training, and none is made."""
        of_training = {
            f"--heal {self.heal}": self.heal,
            f"--on-policy {self.on_policy}": self.on_policy,
            f"--rounds {self.rounds}": self.rounds not in (None, 1),
            "--epochs": self.epochs != 1,
            "--validations": self.validations != VALIDATIONS,
            "--learning-rate": self.learning_rate is not None,
            "--autocast": self.autocast,
        }
        if missing and (said := [name for name, there in of_training.items() if there]):
            raise StreamlineError(f"{' and '.join(said)}: this is of a training, and {missing}.")
