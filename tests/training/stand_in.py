"""A bigram model and a random-token source: the smallest thing the training loop can train."""

import grain
import jax
import jax.numpy as jnp
import numpy as np

from lineax_seq.training import (
    Checkpoints,
    OptimizerConfig,
    RunLog,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
    train,
)

VOCAB, WIDTH, ROWS, LENGTH = 17, 32, 4, 8


def init_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "embed": {"embedding": jax.random.normal(keys[0], (VOCAB, WIDTH)) * 0.5},
        "layers": {
            "kernel": jax.random.normal(keys[1], (2, WIDTH, WIDTH)) * 0.1,
            "norm": {"scale": jnp.ones((2, WIDTH))},
        },
        "lm_head": {"kernel": jax.random.normal(keys[2], (WIDTH, VOCAB)) * 0.1},
    }


KINDS = {
    "embed": {"embedding": "embedding"},
    "layers": {"kernel": "matrix", "norm": {"scale": "norm"}},
    "lm_head": {"kernel": "head"},
}


def loss(params, batch, rng, axis_name=None):
    x = params["embed"]["embedding"][batch["inputs"]]
    for kernel, scale in zip(params["layers"]["kernel"], params["layers"]["norm"]["scale"], strict=True):
        x = x + jnp.tanh(x * scale @ kernel)
    logits = x @ params["lm_head"]["kernel"]
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    weights = batch["loss_weights"]
    right = (logits.argmax(-1) == batch["targets"]) * weights
    return ((nll * weights).sum(), weights.sum()), {"accuracy": (right.sum(), weights.sum())}


class Rows:
    """64 rows of a noisy successor language; the loss weights vary, so a mean over rows is not a mean over tokens."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        tokens = (rng.integers(VOCAB) + np.cumsum(rng.integers(1, 3, LENGTH + 1))) % VOCAB
        return {
            "inputs": tokens[:-1].astype(np.int32),
            "targets": tokens[1:].astype(np.int32),
            "loss_weights": (rng.random(LENGTH) < rng.random()).astype(np.float32),
        }


def iterator(seed=0):
    return iter(grain.MapDataset.source(Rows()).shuffle(seed).repeat().batch(ROWS).to_iter_dataset())


class Hooked:
    """A checkpointable iterator that calls `hook(n)` before it gives batch n = 1, 2, ..."""

    def __init__(self, hook):
        self.hook, self.asked, self.iterator = hook, 0, iterator()

    def __next__(self):
        self.asked += 1
        return self.hook(self.asked) or next(self.iterator)

    def get_state(self):
        return self.iterator.get_state()

    def set_state(self, state):
        self.iterator.set_state(state)


OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup=0.1)
TRANSFORM = make_optimizer(OPTIMIZER, KINDS)
STEP = make_train_step(loss, TRANSFORM, microbatches=2)


def run(directory, *, steps, every=5, batches=None, step_function=STEP, **loop_options):
    """Train the stand-in in `directory`, from its newest checkpoint if it has one; returns (state, signal)."""
    state = init_state(init_params(), TRANSFORM, seed=3)
    batches = iterator() if batches is None else batches
    with Checkpoints(directory / "checkpoints", every=every) as checkpoints:
        if checkpoints.latest is not None:
            state = checkpoints.restore(state, batches)
        with RunLog(directory, steps=steps, start=int(state.step)) as log:
            rates = learning_rate_schedule(OPTIMIZER, steps)
            return train(
                state, step_function, batches, learning_rates=rates, log=log, checkpoints=checkpoints, **loop_options
            )
