"""Following the state of a finite group by construction: with beta = 2 every micro-step reflects; nothing is trained.

The state starts as the identity and nothing is written, so it is the product of the tokens' matrices so far. A token's
output is a row in general position times that product, which no two elements of the group share.
"""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import lineax_seq as ls

TOKENS = 4096


def permutations(n: int) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Every element of S_n as its matrix and as swaps (reflections along e_i - e_j), the first one first."""
    elements = []
    for order in itertools.permutations(range(n)):
        matrix, swaps, rest = np.eye(n)[list(order)], [], list(order)
        for i in range(n):
            while rest[i] != i:
                j = rest[i]
                rest[i], rest[j] = rest[j], rest[i]
                swaps.append((np.eye(n)[i] - np.eye(n)[j]) / np.sqrt(2))
        elements.append((matrix, swaps[::-1]))
    return elements


def rotation(axis, angle: float) -> np.ndarray:
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def two_mirrors(matrix: np.ndarray) -> list[np.ndarray]:
    """Normals of two mirrors whose reflections, one after the other, are this rotation."""
    values, vectors = np.linalg.eig(matrix)
    axis = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    first = np.cross(axis, np.eye(3)[np.argmin(np.abs(axis))])
    first /= np.linalg.norm(first)
    second = first + matrix @ first  # half way to where the rotation takes it
    if np.linalg.norm(second) < 1e-6:  # half a turn
        second = np.cross(axis, first)
    return [first, second / np.linalg.norm(second)]


def rotations(*generators: np.ndarray) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """The group that rotations of space generate, every element as its matrix and as two reflections."""
    group = [np.eye(3)]
    for element in group:
        for generator in generators:
            new = generator @ element
            if not any(np.allclose(new, known, atol=1e-6) for known in group):
                group.append(new)
    return [(matrix, two_mirrors(matrix)) for matrix in group]


GROUPS = {
    "S3": (6, 2, lambda: permutations(3)),
    "S5": (120, 4, lambda: permutations(5)),
    "S4": (24, 2, lambda: rotations(rotation([0, 0, 1], np.pi / 2), rotation([1, 1, 1], 2 * np.pi / 3))),
    "A5": (
        60,
        2,
        lambda: rotations(rotation([0, 1, (1 + 5**0.5) / 2], 2 * np.pi / 5), rotation([1, 1, 1], 2 * np.pi / 3)),
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_finite_group_is_followed_exactly(name):
    """Every one of 4,096 random tokens, in float32, through the chunk form: S5 needs four reflections, the rest two."""
    order, steps, build = GROUPS[name]
    group = build()
    matrices = np.stack([matrix for matrix, _ in group])
    size = matrices.shape[1]
    keys, beta = np.zeros((order, steps, size)), np.zeros((order, steps))
    for i, (matrix, normals) in enumerate(group):
        keys[i, : len(normals)] = np.reshape(normals, (-1, size))
        beta[i, : len(normals)] = 2.0
        mirrored = functools.reduce(lambda m, n: m - 2 * np.outer(n, n @ m), normals, np.eye(size))
        np.testing.assert_allclose(mirrored, matrix, atol=1e-12)

    nearest = lambda x, known: np.argmin(((x[:, None] - known[None]) ** 2).sum(-1), axis=1)  # noqa: E731
    flat = matrices.reshape(order, -1)
    product = np.stack([nearest((m @ matrices).reshape(order, -1), flat) for m in matrices])  # product[i, j] = m_i m_j
    words = np.random.default_rng(0).integers(order, size=TOKENS)
    truth = np.array(list(itertools.accumulate(words, lambda before, word: product[word, before], initial=0))[1:])
    identity = nearest(np.eye(size).reshape(1, -1), flat)[0]
    assert identity == 0 and set(truth) == set(range(order))

    query = np.arange(1.0, size + 1) ** 1.5
    o, final = ls.gated_delta_product(
        jnp.broadcast_to(jnp.asarray(query, jnp.float32), (1, TOKENS, 1, size)),
        jnp.asarray(keys[words], jnp.float32)[None, :, :, None],
        jnp.zeros((1, TOKENS, steps, 1, size), jnp.float32),
        beta=jnp.asarray(beta[words], jnp.float32)[None, :, :, None],
        scale=1.0,
        initial_state=jnp.eye(size)[None, None],
    )
    assert o.dtype == jnp.float32
    followed = nearest(np.asarray(o)[0, :, 0], query @ matrices)
    assert np.all(followed == truth), (
        f"{np.mean(followed == truth):.2%} right, first wrong at {np.argmin(followed == truth)}"
    )
    drift = np.abs(np.asarray(final)[0, 0] - matrices[truth[-1]]).max()
    assert drift < 1e-3, drift


@pytest.mark.parametrize("form", ["chunk", "scan"])
def test_parity_is_an_eigenvalue_of_minus_one(form):
    """One channel, beta = 2 on every one: the state changes its sign, exactly."""
    bits = np.random.default_rng(0).integers(2, size=TOKENS)
    ones = jnp.ones((1, TOKENS, 1, 1))
    beta = jnp.asarray(2.0 * bits, jnp.float32)[None, :, None]
    o, _ = ls.delta_rule(ones, ones, 0 * ones, beta, initial_state=jnp.ones((1, 1, 1, 1)), form=form)
    np.testing.assert_array_equal(np.asarray(o)[0, :, 0, 0], (-1.0) ** np.cumsum(bits))
