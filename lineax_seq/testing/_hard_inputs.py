"""Inputs on which chunk forms are known to give NaN, infinity or a drifting state: finite and right on all of them."""

import numpy as np

from ..core.arguments import log_decay, rate, wide_rate
from ..core.operator import Operator

# Decays that are not drawn as logs of decays: what a log-decay of 1 is in each.
DECAYS = {"slopes": -1.0, "A": 100.0}


def _first_key_everywhere(k):
    return np.broadcast_to(k[:, :1], k.shape)


def _positive_unit(k):
    return np.abs(k) / np.linalg.norm(k, axis=-1, keepdims=True)


def _mixed_gates(g):
    """Slow decays with now and then a gate that closes all but completely."""
    return np.where(closing(g), -1e4, g)


def closing(g) -> np.ndarray:
    """Which gates close: one in ten."""
    return np.random.default_rng(0).random(g.shape) < 0.1


# `g` stands for every log of a decay, `beta` for every rate in (0, 1) or (0, 2).
HARD_INPUTS = {
    "g=0": dict(g=0.0),
    "g=-1e-6": dict(g=-1e-6),
    "g=-30": dict(g=-30.0),
    "g=-1e4": dict(g=-1e4),
    "g=-1e4 among slow ones": dict(g=_mixed_gates),
    "beta=0": dict(beta=0.0),
    "beta=1": dict(beta=1.0),
    "beta=2": dict(beta=2.0, g=0.0),
    "identical keys": dict(k=_first_key_everywhere),
    "identical keys, beta=1, no decay": dict(k=_first_key_everywhere, beta=1.0, g=0.0),
    "identical keys, beta=2, no decay": dict(k=_first_key_everywhere, beta=2.0, g=0.0),
    "positive keys": dict(k=_positive_unit),
    "positive keys, beta=2, no decay": dict(k=_positive_unit, beta=2.0, g=0.0),
    "slow decay": dict(g=lambda g: g * 1e-3),
}


def changes(operator: Operator, hard: str) -> dict:
    """argument -> its constant, or a function of what it is; empty where the inputs say nothing to this recurrence."""
    found = {}
    for name, argument in operator.arguments.items():
        decays = name in DECAYS or argument.draw is log_decay
        key = "g" if decays else "beta" if argument.draw in (rate, wide_rate) else name
        if key in HARD_INPUTS[hard]:
            value, unit = HARD_INPUTS[hard][key], DECAYS.get(name, 1.0)
            found[name] = (lambda x, f=value, u=unit: f(x / u) * u) if callable(value) else value * unit
    return found


def changed(args: dict, changes: dict) -> dict:
    new = {
        name: value(np.asarray(args[name])) if callable(value) else np.full_like(args[name], value)
        for name, value in changes.items()
    }
    return {**args, **new}
