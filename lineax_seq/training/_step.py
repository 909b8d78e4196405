"""One update of the parameters: gradient of a token-weighted mean, in as many microbatches as fit in memory.

A loss function returns **sums**, so that a mean over tokens never depends on how the batch was cut:

    loss_function(params, batch, key) -> ((sum of weight * nll, sum of weights), {metric: (sum, sum of weights)})

    L = sum_m nll_m / sum_m w_m,    dL/dp = (sum_m d nll_m / dp) / sum_m w_m        (m runs over the microbatches)

Only the trainable parameters are differentiated and have optimizer state. A part of a tree of parameters is that tree
with None, a tree without leaves, in place of the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._task import Batch, Metrics, Sums

PyTree = Any
LossFunction = Callable[[PyTree, Batch, jax.Array], tuple[Sums, Metrics]]
TrainStep = Callable[["TrainState", Batch, Any], tuple["TrainState", dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything an update reads and writes: number of updates done, parameters, optimizer state, random key."""

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    rng: jax.Array


def trained_part(params: PyTree, trainable: PyTree | None) -> PyTree:
    """`params`, or a tree like them, without the leaves where `trainable` is False; None: all are trainable."""
    return params if trainable is None else jax.tree.map(lambda yes, x: x if yes else None, trainable, params)


def init_state(
    params: PyTree, optimizer: optax.GradientTransformation, seed: int, trainable: PyTree | None = None
) -> TrainState:
    """State before the first update; the random key of update n is `fold_in(key(seed), n)`.

    Takes the arrays of `params` over: the first train step donates them, so the caller must not use them again.
    """
    return TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(trained_part(params, trainable)), jax.random.key(seed)
    )


def leaf_paths(params: PyTree) -> list[str]:
    """Names of the parameters, such as "embed.embedding", in the order of the leaves."""
    return [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree_util.tree_leaves_with_path(params)]


def state_leaf_names(params: PyTree, trainable: PyTree | None = None) -> list[str]:
    """Names behind the flags of the `nonfinite` metric: parameters, then of the trainable ones the gradients and the
    parameters after the update."""
    trained = leaf_paths(trained_part(params, trainable))
    after = [f"{what} {path}" for what in ("gradient of", "updated parameter") for path in trained]
    return [f"parameter {path}" for path in leaf_paths(params)] + after


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


def _gradient(loss_of: Callable, trained: PyTree, batch: Batch, rng: jax.Array, microbatches: int, shardings: PyTree):
    """(sum of nll, sum of weights, metrics, gradient of the sum of nll); the accumulators are float32."""

    def value_and_grad(trained, batch, rng):
        (nll, rest), grads = jax.value_and_grad(loss_of, has_aux=True)(trained, batch, rng)
        return nll, rest, grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)

    if microbatches == 1:
        return value_and_grad(trained, batch, rng)

    def add(total, microbatch_and_rng):
        found = value_and_grad(trained, *microbatch_and_rng)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, found), None

    batches, rngs = split_batch(batch, microbatches), jax.random.split(rng, microbatches)
    like = jax.eval_shape(value_and_grad, trained, *jax.tree.map(lambda x: x[0], (batches, rngs)))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), like)
    total, _ = jax.lax.scan(add, start, (batches, rngs))
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
    trainable: PyTree | None = None,
) -> TrainStep:
    """Jitted `(state, batch, learning_rate) -> (state, metrics)`; the given state is donated.

    `optimizer` yields updates for learning rate 1 (`make_optimizer`); they are multiplied by `learning_rate`, so one
    compilation serves every schedule and every number of steps. `shardings` is the state's over a mesh, or None.
    `trainable` is a tree of bools, as in `init_state`.

    Metrics (device scalars, float32): `loss` (the mean), `tokens` (sum of weights), `grad_norm` (before clipping),
    `update_norm`, `param_norm` (after the update), the means of the task's own, and `nonfinite`, bool flags in the
    order of `state_leaf_names`.
    """
    if microbatches < 1:
        raise ValueError(f"make_train_step: microbatches is {microbatches}; it must be at least 1")

    def train_step(state: TrainState, batch: Batch, learning_rate) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        along = None if shardings is None else trained_part(shardings.params, trainable)
        trained = trained_part(state.params, trainable)

        def whole(part: PyTree) -> PyTree:
            if trainable is None:
                return part
            return jax.tree.map(lambda yes, x, y: x if yes else y, trainable, part, state.params)

        def loss_of(part, batch, rng):
            (nll, weight), metrics = loss_function(whole(part), batch, rng)
            return nll, (weight, metrics)

        nll, (weight, own), grads = _gradient(loss_of, trained, batch, rng, microbatches, along)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        updates = jax.tree.map(lambda u: (learning_rate * u).astype(u.dtype), updates)
        updated = optax.apply_updates(trained, updates)
        params = whole(updated)
        # One sum of squares per leaf serves the norms and tells which leaf is not finite (or too large to square). In
        # the order of cause and effect, so that the first bad leaf is where it began.
        squares = [_squares(state.params), _squares(grads), _squares(updated)]
        after = squares[2] if trainable is None else _squares(params)
        metrics = {name: total / count for name, (total, count) in own.items()} | {
            "loss": nll / weight,
            "tokens": weight,
            "grad_norm": jnp.sqrt(squares[1].sum()),
            "update_norm": jnp.sqrt(_squares(updates).sum()),
            "param_norm": jnp.sqrt(after.sum()),
            "nonfinite": ~jnp.isfinite(jnp.concatenate(squares)),
        }
        return TrainState(state.step + 1, params, opt_state, state.rng), metrics

    if shardings is None:
        return jax.jit(train_step, donate_argnums=0)
    everywhere = shardings.step  # a scalar's
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, everywhere))
