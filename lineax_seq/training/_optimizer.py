"""Optimisers and learning-rate schedules: which parameter gets which update, decay and rate.

Parameters fall into three kinds, by the name of their leaf and the shape of one layer of them:

    matrix     kernels of projections, [.., in, out]: Muon's orthogonalised update (or Adam), weight decay
    embedding  token embeddings and the head: Adam, weight decay only on request
    other      norms, biases, A_log, dt_bias, convolutions, gates with one output per head: Adam, no weight decay

Sources: AdamW, Loshchilov & Hutter 2017, arXiv:1711.05101 (decay multiplied by the learning rate, as in Optax).
Muon, Jordan et al. 2024; its RMS-matched scale 0.2 * sqrt(max(in, out)), Liu et al. 2025, arXiv:2502.16982, eq. 4.
WSD, Hu et al. 2024, arXiv:2404.06395.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

PyTree = Any

# A gate with one output per head is a bundle of vectors, not a map between feature spaces: orthogonalising it would
# give every head's gate the same size of step whatever its gradient.
MATRIX_MIN_WIDTH = 32


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and weight decay."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: orthogonalised momentum for projection kernels, Adam (with Nesterov) for the rest. adamw: Adam for all."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    adam_learning_rate: float | None = None
    """Peak learning rate of what Muon leaves to Adam; None: the same as learning_rate. Only for muon."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises linearly from 0 to the peak."""
    decay: Literal["linear", "cosine", "wsd"] = "linear"
    """Shape after warmup; wsd stays at the peak and then falls linearly over the last decay_fraction of the steps."""
    decay_fraction: float | None = None
    """Fraction of the steps in wsd's decay; None: 0.2. Only for wsd."""
    final_learning_rate: float = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    weight_decay: float = 0.1
    """Decoupled decay per step, times the learning rate; matrices only."""
    decay_embeddings: bool = False
    """Apply weight decay to token embeddings and head too."""
    clip_norm: float | None = 1.0
    """Gradients with a larger global L2 norm are scaled down to it; None: no clipping."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.95
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    muon_beta: float = 0.95
    """Muon's momentum (Nesterov)."""
    newton_schulz_steps: int = 5
    """Iterations that orthogonalise Muon's momentum."""

    def __post_init__(self):
        complaints = [
            f"{name} is {getattr(self, name)!r}; {wanted}"
            for name, bad, wanted in (
                ("name", self.name not in ("muon", "adamw"), "choose muon or adamw"),
                ("decay", self.decay not in ("linear", "cosine", "wsd"), "choose linear, cosine or wsd"),
                ("learning_rate", not self.learning_rate > 0, "it must be above 0"),
                ("warmup", not 0 <= self.warmup < 1, "it is a fraction of the steps in [0, 1)"),
                ("final_learning_rate", not 0 <= self.final_learning_rate <= 1, "it is a fraction of the peak"),
                ("weight_decay", self.weight_decay < 0, "it must not be negative"),
                ("clip_norm", self.clip_norm is not None and not self.clip_norm > 0, "it must be above 0, or None"),
                ("newton_schulz_steps", self.newton_schulz_steps < 1, "it must be at least 1"),
                (
                    "adam_learning_rate",
                    self.adam_learning_rate is not None and (self.name != "muon" or not self.adam_learning_rate > 0),
                    "it must be above 0 and only belongs to name=muon; leave it None",
                ),
                (
                    "decay_fraction",
                    self.decay_fraction is not None
                    and (self.decay != "wsd" or not 0 < self.decay_fraction <= 1 - self.warmup),
                    "it only belongs to decay=wsd and must be above 0 and fit after warmup; leave it None",
                ),
            )
            if bad
        ]
        if complaints:
            raise ValueError("OptimizerConfig: " + "; ".join(complaints))


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> np.ndarray:
    """Learning rate of every update, float32 [steps].

    The first update has `peak / warmup steps` and the last one just above the final rate, so none is wasted at 0.

    Raises:
      ValueError: `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"learning_rate_schedule: steps is {steps}; it must be at least 1")
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate
    warmup = min(round(config.warmup * steps), steps - 1)
    rest = steps - warmup
    match config.decay:
        case "linear":
            after = optax.linear_schedule(peak, final, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_learning_rate)
        case "wsd":
            fraction = 0.2 if config.decay_fraction is None else config.decay_fraction
            falling = max(1, min(round(fraction * steps), rest))
            after = optax.linear_schedule(peak, final, falling, transition_begin=rest - falling)
    rates = after
    if warmup:
        rising = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else optax.constant_schedule(peak)
        rates = optax.join_schedules([rising, after], [warmup])
    return np.asarray(jax.vmap(rates)(np.arange(steps)), np.float32)


def parameter_kinds(params: PyTree) -> PyTree:
    """ "matrix", "embedding" or "other" for every leaf; see the top of the module."""

    def kind(path, leaf) -> str:
        names = [str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", "")))) for entry in path]
        if any(word in name for name in names for word in ("embed", "head_kernel", "lm_head", "unembed")):
            return "embedding"
        is_projection = names[-1] == "kernel" and not any("conv" in name for name in names)
        if is_projection and leaf.ndim >= 2 and min(leaf.shape[-2:]) >= MATRIX_MIN_WIDTH:
            return "matrix"
        return "other"

    return jax.tree_util.tree_map_with_path(kind, params)


def weight_decay_mask(params: PyTree, *, embeddings: bool = False) -> PyTree:
    """True for the leaves that decay: matrices, and embeddings on request."""
    decayed = ("matrix", "embedding") if embeddings else ("matrix",)
    return jax.tree.map(lambda kind: kind in decayed, parameter_kinds(params))


def muon_dimension_numbers(params: PyTree) -> PyTree:
    """Optax's axes of every matrix, None for what goes to Adam; leading axes (stacked layers) are independent."""
    return jax.tree.map(
        lambda kind: MuonDimensionNumbers(-2, -1) if kind == "matrix" else None, parameter_kinds(params)
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, Muon or Adam, decoupled weight decay: updates for a learning rate of 1 (see `make_train_step`)."""
    adam = {"eps": config.eps}
    if config.name == "muon":
        ratio = 1.0 if config.adam_learning_rate is None else config.adam_learning_rate / config.learning_rate
        core = muon(
            learning_rate=1.0,
            ns_steps=config.newton_schulz_steps,
            beta=config.muon_beta,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_learning_rate=ratio,
            muon_weight_dimension_numbers=muon_dimension_numbers,
            consistent_rms=0.2,
            **adam,
        )
    else:
        core = optax.adam(1.0, b1=config.beta1, b2=config.beta2, **adam)
    parts = [core]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:

        def mask(params):
            return weight_decay_mask(params, embeddings=config.decay_embeddings)

        # Last and negative: the core's updates already carry the minus sign of descent.
        parts.append(optax.add_decayed_weights(-config.weight_decay, mask))
    return optax.chain(*parts)
