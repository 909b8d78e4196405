"""Optimisers and learning-rate schedules: which parameter gets which update, decay and rate.

Parameters have kinds (`Task.kinds`), which say what becomes of them; names and shapes are not looked at:

    matrix      maps between feature spaces, [.., in, out]: Muon's orthogonalised update (or Adam), weight decay
    embedding, head    Adam, weight decay only on request
    the others  Adam, no weight decay

Sources: AdamW, Loshchilov & Hutter 2017, arXiv:1711.05101 (decay multiplied by the learning rate, as in Optax).
Muon, Jordan et al. 2024; its RMS-matched scale 0.2 * sqrt(max(in, out)), Liu et al. 2025, arXiv:2502.16982, eq. 4.
WSD, Hu et al. 2024, arXiv:2404.06395.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from ..core.checks import nearest
from ..core.fields import Within, check_fields

PyTree = Any

KINDS = ("matrix", "embedding", "head", "vector", "norm", "convolution", "gate", "decay")
Positive = Annotated[float, Within("(0, inf)")]
Momentum = Annotated[float, Within("[0, 1)")]


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and weight decay."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: orthogonalised momentum for projection kernels, Adam (with Nesterov) for the rest. adamw: Adam for all."""
    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    adam_learning_rate: Positive | None = None
    """Peak learning rate of what Muon leaves to Adam; None: the same as learning_rate. Only for muon."""
    warmup: Annotated[float, Within("[0, 1)")] = 0.05
    """Fraction of the steps over which the learning rate rises linearly from 0 to the peak."""
    decay: Literal["linear", "cosine", "wsd"] = "linear"
    """Shape after warmup; wsd stays at the peak and then falls linearly over the last decay_fraction of the steps."""
    decay_fraction: Annotated[float, Within("(0, 1]")] | None = None
    """Fraction of the steps in wsd's decay; None: 0.2. Only for wsd."""
    final_learning_rate: Annotated[float, Within("[0, 1]")] = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    weight_decay: Annotated[float, Within("[0, inf)")] = 0.1
    """Decoupled decay per step, times the learning rate; matrices only."""
    decay_embeddings: bool = False
    """Apply weight decay to token embeddings and head too."""
    clip_norm: Positive | None = 1.0
    """Gradients with a larger global L2 norm are scaled down to it; None: no clipping."""
    beta1: Momentum = 0.9
    """Adam's decay of the first moment."""
    beta2: Momentum = 0.95
    """Adam's decay of the second moment."""
    eps: Positive = 1e-8
    """Adam's epsilon."""
    muon_beta: Momentum = 0.95
    """Muon's momentum (Nesterov)."""
    newton_schulz_steps: Annotated[int, Within("[1, 100]")] = 5
    """Iterations that orthogonalise Muon's momentum."""

    def __post_init__(self):
        check_fields(self)
        complaints = []
        if self.adam_learning_rate is not None and self.name != "muon":
            complaints.append(f"adam_learning_rate only belongs to name=muon, which is {self.name}; leave it None")
        if self.decay_fraction is not None and self.decay != "wsd":
            complaints.append(f"decay_fraction only belongs to decay=wsd, which is {self.decay}; leave it None")
        elif self.decay_fraction is not None and self.decay_fraction > 1 - self.warmup:
            complaints.append(
                f"decay_fraction is {self.decay_fraction:g}; at most {1 - self.warmup:g} fits after warmup"
            )
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
    with jax.transfer_guard("allow"):  # a few thousand numbers, once
        return np.asarray(jax.vmap(rates)(np.arange(steps)), np.float32)


def check_kinds(kinds: PyTree, params: PyTree) -> None:
    """Refuse kinds that are not one of `KINDS` for each parameter.

    Raises:
      ValueError: another tree than that of `params`, or unknown kinds, each with its parameter.
    """
    if jax.tree.structure(kinds) != jax.tree.structure(params):
        raise ValueError(
            f"kinds: got the tree {jax.tree.structure(kinds)}, wanted one kind for each parameter of "
            f"{jax.tree.structure(params)}"
        )
    wrong = [
        f"{jax.tree_util.keystr(path, simple=True, separator='.')} is {kind!r}{nearest(kind, KINDS)}"
        for path, kind in jax.tree_util.tree_leaves_with_path(kinds)
        if kind not in KINDS
    ]
    if wrong:
        raise ValueError(f"kinds: {'; '.join(wrong)}; wanted one of {', '.join(KINDS)}")


def make_optimizer(config: OptimizerConfig, kinds: PyTree) -> optax.GradientTransformation:
    """Clipping, Muon or Adam, decoupled weight decay: updates for a learning rate of 1 (see `make_train_step`).

    `kinds` are those of the parameters that it will be given.
    """
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
            # Leading axes, which stack layers, are independent; None leaves a parameter to Adam.
            muon_weight_dimension_numbers=jax.tree.map(
                lambda kind: MuonDimensionNumbers(-2, -1) if kind == "matrix" else None, kinds
            ),
            consistent_rms=0.2,
            **adam,
        )
    else:
        core = optax.adam(1.0, b1=config.beta1, b2=config.beta2, **adam)
    parts = [core]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        decayed = ("matrix", "embedding", "head") if config.decay_embeddings else ("matrix",)
        # Last and negative: the core's updates already carry the minus sign of descent.
        parts.append(optax.add_decayed_weights(-config.weight_decay, jax.tree.map(lambda kind: kind in decayed, kinds)))
    return optax.chain(*parts)
