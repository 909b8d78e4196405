"""One update of the parameters: gradient of a token-weighted mean, in as many microbatches as fit in memory.

A loss function returns two **sums**, so that a mean over tokens never depends on how the batch was cut:

    loss_function(params, batch, rng) -> (sum of weight * nll in nats, sum of weights),   both float32 scalars

    L = sum_m nll_m / sum_m w_m,    dL/dp = (sum_m d nll_m / dp) / sum_m w_m        (m runs over the microbatches)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any
Batch = Mapping[str, Any]  # of arrays [B, ...], on the host or on devices
LossFunction = Callable[[PyTree, Batch, jax.Array], tuple[jax.Array, jax.Array]]
TrainStep = Callable[["TrainState", Batch, Any], tuple["TrainState", dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything an update reads and writes: number of updates done, parameters, optimizer state, random key."""

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    rng: jax.Array


def init_state(params: PyTree, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """State before the first update; the random key of update n is `fold_in(key(seed), n)`.

    Takes the arrays of `params` over: the first train step donates them, so the caller must not use them again.
    """
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key(seed))


def state_leaf_names(params: PyTree) -> list[str]:
    """Names behind the flags of the `nonfinite` metric: parameters, their gradients, parameters after the update."""
    paths = [
        jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    return [f"{what} {path}" for what in ("parameter", "gradient of", "updated parameter") for path in paths]


def split_batch(batch: Batch, microbatches: int) -> Batch:
    """[B, ...] -> [microbatches, B / microbatches, ...] for every array of the batch.

    Microbatch m takes the rows m, m + microbatches, ...: of rows that are split over devices, each has its share.
    """
    for name, x in batch.items():
        if x.shape[0] % microbatches:
            raise ValueError(
                f"train step: {name!r} has {x.shape[0]} rows, which do not divide into {microbatches} microbatches; "
                "choose a batch size that is a multiple of the accumulation steps"
            )
    return {name: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}


def _gradient(
    loss_function: LossFunction, params: PyTree, batch: Batch, rng: jax.Array, microbatches: int, shardings: PyTree
):
    """(sum of nll, sum of weights, gradient of the sum of nll); the accumulators are float32."""

    def value_and_grad(params, batch, rng):
        sums, grads = jax.value_and_grad(loss_function, has_aux=True)(params, batch, rng)
        return sums, grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)

    if microbatches == 1:
        (nll, weight), grads = value_and_grad(params, batch, rng)
        return nll, weight, grads

    def add(total, microbatch_and_rng):
        (nll, weight), grads = value_and_grad(params, *microbatch_and_rng)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (nll, weight, grads)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
    start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), zeros)
    total, _ = jax.lax.scan(add, start, (split_batch(batch, microbatches), jax.random.split(rng, microbatches)))
    return total


def _squares(tree: PyTree) -> jax.Array:
    """Sum of squares of every leaf, float32 [leaves]."""
    return jnp.stack([jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)])


def make_train_step(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    shardings: TrainState | None = None,
) -> TrainStep:
    """Jitted `(state, batch, learning_rate) -> (state, metrics)`; the given state is donated.

    `optimizer` yields updates for learning rate 1 (`make_optimizer`); they are multiplied by `learning_rate`, so one
    compilation serves every schedule and every number of steps. `shardings` is the state's over a mesh, or None.

    Metrics (device scalars, float32): `loss` (nats per token), `tokens` (sum of weights), `grad_norm` (before
    clipping), `update_norm`, `param_norm` (after the update), and `nonfinite`, bool flags in the order of
    `state_leaf_names`.
    """
    if microbatches < 1:
        raise ValueError(f"make_train_step: microbatches is {microbatches}; it must be at least 1")

    def train_step(state: TrainState, batch: Batch, learning_rate) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        along = None if shardings is None else shardings.params
        nll, weight, grads = _gradient(loss_function, state.params, batch, rng, microbatches, along)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: (learning_rate * u).astype(u.dtype), updates)
        params = optax.apply_updates(state.params, updates)
        # One sum of squares per leaf serves the norms and tells which leaf is not finite (or too large to square). In
        # the order of cause and effect, so that the first bad leaf is where it began.
        squares = [_squares(state.params), _squares(grads), _squares(params)]
        metrics = {
            "loss": nll / weight,
            "tokens": weight,
            "grad_norm": jnp.sqrt(squares[1].sum()),
            "update_norm": jnp.sqrt(_squares(updates).sum()),
            "param_norm": jnp.sqrt(squares[2].sum()),
            "nonfinite": ~jnp.isfinite(jnp.concatenate(squares)),
        }
        return TrainState(state.step + 1, params, opt_state, state.rng), metrics

    if shardings is None:
        return jax.jit(train_step, donate_argnums=0)
    everywhere = shardings.step  # a scalar's
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, everywhere))
