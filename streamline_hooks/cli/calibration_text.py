"""The option --calibration: existing text, generated text, or several sources in shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from streamline_hooks.errors import StreamlineError

if TYPE_CHECKING:
    from streamline_hooks.calibration.sources import TextSources


def parse_sources(given: Sequence[str] | None, temperature: float | None = None) -> TextSources:
    """Parse --calibration and --temperature.

    Raises
    ------
    StreamlineError
        If a mixture is given beside other sources, or a temperature without generated text.
    """
    from streamline_hooks.calibration.sources import TextSources
    from streamline_hooks.cli.short_forms import parse_mixture

    values = tuple(given or ["pydoc"])
    mixtures = [mixture for value in values if (mixture := parse_mixture(value)) is not None]
    if mixtures and len(values) > 1:
        raise StreamlineError(
            f"--calibration was given {len(values)} times, and one is a mixture with shares. Expected a share for "
            "each source; name all of them in one mixture, such as self:0.5,texts:0.5."
        )
    shares = mixtures[0] if mixtures else {}
    sources = TextSources(tuple(shares or values), shares)
    if temperature is not None:
        sources = replace(sources, temperature=temperature)
    if "chat" in sources.names and Path("chat").exists():
        raise StreamlineError(
            "--calibration chat is what the model says in conversations, and there is a file or folder 'chat' here. "
            "Write ./chat for that one, or rename it."
        )
    if sources.generated and len(sources.names) > 1 and not shares:
        raise StreamlineError(
            f"--calibration {sources.generated[0]} stands alone; leave the other sources away, or say how much there "
            f"is to be of each: {','.join(f'{name}:{1 / len(values):.6g}' for name in values)}."
        )
    if temperature is not None and not sources.generated:
        raise StreamlineError(
            f"--temperature {temperature:g} is that of text which the model writes itself; add --calibration self or "
            "chat, or leave it out."
        )
    return sources


def special_option(sources: TextSources) -> str:
    """Return the option if the model generates text or shares were given, else an empty string."""
    if not (sources.generated or sources.shares):
        return ""
    return f"--calibration {sources.generated[0] if sources.generated else 'with shares'}"
