"""What a user writes, for the type checker: `test_signatures.py` says which of these lines it must refuse."""

from typing import assert_type

import jax
import numpy as np

import lineax_seq as ls


def right(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, ids: np.ndarray) -> jax.Array:
    o, state = ls.gated_delta_rule(q, k, v, g, beta)
    assert_type(o, jax.Array)
    o, state = ls.gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, segment_ids=ids, form="scan")
    o, state = ls.gla(q, k, v, g, scale=1.0, implementation=("mosaic_tpu", "xla"), chunk_size=32, strategy="ring")
    o, state = ls.ssd(v, g, beta, k, q)  # D is optional
    o, state = ls.retention(q, k, v, causal=False)
    o, state = ls.gated_delta_product(q, k, v, None, beta)
    o_t, state = ls.gla.step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], state=state)
    assert_type(o_t, jax.Array)
    operator: ls.Operator = ls.RECURRENCES["gla"]
    args = operator.example(jax.random.key(0), B=1, T=8, H=1, K=4, V=4)
    return ls.parallel.sequence_parallel(ls.gla, jax.make_mesh((1,), ("seq",)))(**args)[0] + o + o_t


def wrong(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> None:
    ls.gla(q, k, v, gate=g)  # wrong: missing g, and no such name
    ls.gla(q, k, v)  # wrong: missing g
    ls.gla(q, k, v, g, form="chunks")  # wrong: no such form
    ls.gla(q, k, v, g, segment_id=g)  # wrong: no such option
    ls.gla(q, k, v, g, implementation="mosaic_tpus")  # wrong: no such implementation
    ls.gla(q, k, v, g, causal=False)  # wrong: it reads the past only
    ls.gla(q, k, v, g, 1.0)  # wrong: scale is by name only
    ls.gla(q, k, v, g, chunk_size=32.0)  # wrong: not a whole number
    ls.gla.step(q, k, v, g, initial_state=None)  # wrong: a step's state is `state`
    print(ls.gla(q, k, v, g).shape)  # wrong: a call returns a pair
    ls.glaa(q, k, v, g)  # wrong: no such recurrence
