"""Family: one decay per key channel. S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

Scores A_ij = sum_d q_id k_jd exp(G_i - G_j)_d, by halves (see `_decay`): log2 C levels of matrix products whose
exponents are never positive. One product (Q exp(G - M)) (K exp(M - G))^T with M in the middle of the chunk is enough
where the decays of a chunk stay within float range (`mild`), which trained gates do.
"""

import jax
import jax.numpy as jnp

from ..monoid import DECAY, Affine
from ..recurrence import Recurrence
from ..typing import Inputs
from . import _decay, _scalar

# Half of it is the largest exponent of the single product, the whole the smallest: e^-60 is a normal float32
# with 30 binary orders to spare for the operands.
MILD_DECAY = 60.0


def element(x: Inputs) -> Affine:
    return Affine(x["g"][:, None], x["k"][:, None] * x["v"][None, :])


def decayed_scores(queries: jax.Array, keys: jax.Array, g: jax.Array) -> tuple[jax.Array, _decay.Sums]:
    """Strictly lower `[C, C]` scores `sum_d q_id k_jd exp(g_{j+1} + ... + g_i)_d`, and g's sums over the chunk.

    `queries [..., C, K]` may stack several sets that meet the same keys `[C, K]` and decays `g [C, K]`.
    """
    blocks = lambda x, h: x.reshape(*x.shape[:-2], -1, 2, h, x.shape[-1])  # noqa: E731
    sums, size = _decay.leaves(g), g.shape[0]
    matrix = jnp.zeros((*queries.shape[:-2], size, 1, 1), g.dtype)
    for h in (2**i for i in range(size.bit_length() - 1)):
        since_middle = jnp.exp(sums.forward.reshape(-1, 2, *sums.forward.shape[1:])[:, 1])
        until_middle = jnp.exp(sums.backward.reshape(-1, 2, *sums.backward.shape[1:])[:, 0])
        later = blocks(queries, h)[..., 1, :, :] * since_middle
        earlier = blocks(keys, h)[..., 0, :, :] * until_middle
        lower = jnp.einsum("...mid,mjd->...mij", later, earlier)
        matrix = jax.vmap(_decay.assemble)(matrix, lower) if queries.ndim == 3 else _decay.assemble(matrix, lower)
        sums = _decay.double(sums)
    return matrix[..., 0, :, :], _decay.Sums(sums.forward[0], sums.backward[0])


def prepare(x: Inputs, keep: jax.Array | None) -> _scalar.Factors:
    docs = _decay.documents(keep)
    scores, sums = decayed_scores(x["q"], x["k"], x["g"])
    scores = scores + jnp.diag((x["q"] * x["k"]).sum(-1))
    scores = _decay.causal(scores, docs)
    return _scalar.factors(x, scores, jnp.exp(sums.forward), jnp.exp(sums.backward), docs)


DIAGONAL_DECAY = Recurrence(
    name="diagonal_decay",
    fields={"q": "H K", "k": "H K", "v": "HV V", "g": "HV K"},
    element=element,
    output=_scalar.output,
    monoid=DECAY,
    init_state=_scalar.init_state,
    prepare=prepare,
    advance=_scalar.advance,
    readout=_scalar.readout,
)
