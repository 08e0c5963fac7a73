"""States to sum, and what is to come out, by the definitions and in NumPy's float64."""

from __future__ import annotations

import numpy as np
import torch


def states_of(places: int, tokens: int, features: int = 8, seed: int = 0) -> torch.Tensor:
    """States of one sequence along a stream, of shape (places, tokens, features), with small and large steps."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1.0, 0.3, 30.0, 0.01, 1e-4])[torch.arange(places) % 5]
    return (torch.randn(places, tokens, features, generator=generator) * sizes[:, None, None]).cumsum(0)


def cosines(states: np.ndarray) -> np.ndarray:
    """Of every token and two places: (places, tokens, features) to (tokens, places, places)."""
    unit = states.astype(np.float64)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    return np.clip(np.einsum("atd,btd->tab", unit, unit), -1.0, 1.0)


def angles(states: np.ndarray) -> np.ndarray:
    """As shares of π, from half chords, which are right where an arccos is not: near 0 and near π."""
    unit = states.astype(np.float64)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    minus = np.linalg.norm(unit[:, None] - unit[None], axis=-1)
    plus = np.linalg.norm(unit[:, None] + unit[None], axis=-1)
    return np.moveaxis(2 * np.arctan2(minus, plus) / np.pi, -1, 0)


def entropy(samples: np.ndarray, buckets: int = 20) -> float:
    """Of (tokens, features), in nats a feature, by NumPy's own histogram."""
    counts = [np.histogram(column, bins=buckets)[0] for column in samples.T]
    shares = [c[c > 0] / len(samples) for c in counts]
    return float(np.mean([-(p * np.log(p)).sum() for p in shares]))
