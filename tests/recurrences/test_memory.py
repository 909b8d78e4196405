"""What a backward pass holds in memory, as compiled."""

import jax
import pytest

import lineax_seq as ls


@pytest.mark.parametrize("operator", ls.RECURRENCES.values(), ids=ls.RECURRENCES.keys())
def test_backward_memory_is_linear_and_holds_no_token_states(operator):
    """Temporary bytes of forward and backward, as compiled."""
    sizes = dict(B=1, H=1, HV=1, K=32, V=32, D=32, N=16, L=12, C=32)

    def temporary(length):
        args = jax.eval_shape(lambda: operator.example(jax.random.key(0), T=length, **sizes))
        loss = lambda args: operator(**args, chunk_size=sizes["C"])[0].sum()  # noqa: E731
        state = jax.eval_shape(lambda a: operator(**a)[1], args)
        compiled = jax.jit(jax.grad(loss)).lower(args).compile()
        return compiled.memory_analysis().temp_size_in_bytes, sum(4 * s.size for s in jax.tree.leaves(state))

    # several blocks of chunks each: a sequence of one block has no loop, and needs less
    (short, _), (long, state_bytes) = temporary(4096), temporary(16384)
    assert long <= 4.4 * short, f"temporary bytes grow from {short} to {long} when T grows fourfold"
    if operator.recurrence.prepare is not None and state_bytes >= 4 * sizes["K"] * sizes["V"]:
        assert long < 16384 * state_bytes, f"{long} bytes: as much as a state for every token, {16384 * state_bytes}"


def test_mamba_holds_the_states_of_one_chunk_at_a_time():
    """Compiled temporary bytes of forward and backward, against a state [D, N] for every token."""
    args = jax.eval_shape(lambda: ls.mamba.example(jax.random.key(0), B=1, T=2048, D=32, N=64))
    loss = lambda args: ls.mamba(**args, chunk_size=64)[0].sum()  # noqa: E731
    used = jax.jit(jax.grad(loss)).lower(args).compile().memory_analysis().temp_size_in_bytes
    assert used < 2048 * 32 * 64 * 4 / 2
