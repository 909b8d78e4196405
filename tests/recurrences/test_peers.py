"""Against other people's reference code in PyTorch, where it is installed: outputs, final state and gradients.

`pip install torch --index-url https://download.pytorch.org/whl/cpu`, `pip install --no-deps fla-core einops` and
`pip install transformers` bring the peers; then `python -m pytest -m peers`. What is not installed is skipped.

flash-linear-attention's packages import Triton kernels; their plain references are loaded by file path instead.
"""

import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import GRADIENTS, OUTPUTS, assert_close

import lineax_seq as ls

pytestmark = pytest.mark.peers
SIZES = dict(B=2, T=64, H=2, HV=2, K=16, V=16, D=16, N=8, NH=2, L=7)


class Peer(NamedTuple):
    """Someone's reference for a recurrence."""

    operator: ls.Operator
    where: str  # a file inside the package `fla`, or a module of transformers
    function: str
    call: Callable  # (function, torch arguments by our names) -> (o, final state or None)


def heads_first(*xs):
    return [x.transpose(1, 2) for x in xs]


def _head_first(function, order, a):
    o, state = function(*heads_first(*(a[name] for name in order)))
    return o.transpose(1, 2), state


def _tokens_first(function, a, *names):
    return function(a["q"], a["k"], a["v"], *(a[name] for name in names), output_final_state=True)


def _delta_product(function, a):
    micro = lambda x: x.flatten(1, 2)  # noqa: E731
    k, v, beta, scale = micro(a["k"]), micro(a["v"]), micro(a["beta"]), a["q"].shape[-1] ** -0.5
    return function(a["q"], k, v, a["g"], beta, scale, output_final_state=True, num_householder=a["k"].shape[2])


def _rwkv6(function, a):
    q, k, v, g = heads_first(a["q"], a["k"], a["v"], a["g"])
    o, state = function(q, k, v, g, a["u"], scale=1.0, output_final_state=True)
    return o.transpose(1, 2), state


def _rwkv7(function, a):
    # it scales by K**-0.5, RWKV-7 does not
    q, k, v, read, put, g = heads_first(a["q"] * a["q"].shape[-1] ** 0.5, a["k"], a["v"], a["a"], a["b"], a["g"])
    o, state = function(q, k, v, read, put, g)
    return o.transpose(1, 2), state


def _mamba2(function, a):
    o, state = function(a["x"], a["dt"], a["A"], a["B"], a["C"], chunk_size=16, return_final_states=True)
    return o, state.transpose(-1, -2)


def _mamba(function, a):
    first = lambda x: x.transpose(1, 2)  # noqa: E731
    o, state = function(first(a["u"]), first(a["dt"]), a["A"], first(a["B"]), first(a["C"]), return_last_state=True)
    return first(o), state


PEERS = [
    Peer(ls.linear_attention, "ops/linear_attn/naive.py", "naive_recurrent_linear_attn", _tokens_first),
    Peer(ls.retention, "ops/retention/naive.py", "naive_retention", lambda f, a: (_retention(f, a), None)),
    Peer(ls.simple_gla, "ops/simple_gla/naive.py", "naive_recurrent_simple_gla", lambda f, a: _tokens_first(f, a, "g")),
    Peer(ls.gla, "ops/gla/naive.py", "naive_recurrent_gla", lambda f, a: _tokens_first(f, a, "g")),
    Peer(ls.hgrn, "ops/hgrn/naive.py", "naive_recurrent_hgrn", lambda f, a: f(a["x"], a["g"], output_final_state=True)),
    Peer(ls.rwkv6, "ops/rwkv6/recurrent_naive.py", "naive_recurrent_rwkv6", _rwkv6),
    Peer(
        ls.delta_rule,
        "ops/delta_rule/naive.py",
        "delta_rule_recurrence",
        lambda f, a: _head_first(f, ("q", "k", "v", "beta"), a),
    ),
    Peer(
        ls.gated_delta_rule,
        "ops/gated_delta_rule/naive.py",
        "naive_recurrent_gated_delta_rule",
        lambda f, a: _tokens_first(f, a, "beta", "g"),
    ),
    Peer(
        ls.gated_delta_product,
        "ops/gated_delta_product/naive.py",
        "naive_recurrent_gated_delta_product",
        _delta_product,
    ),
    Peer(ls.kda, "ops/kda/naive.py", "naive_recurrent_kda", lambda f, a: _tokens_first(f, a, "g", "beta")),
    Peer(ls.gdn2, "ops/gdn2/naive.py", "naive_recurrent_gdn2", lambda f, a: _tokens_first(f, a, "g", "b", "w")),
    Peer(ls.rwkv7, "ops/generalized_delta_rule/dplr/naive.py", "dplr_recurrence", _rwkv7),
    Peer(
        ls.log_linear_attention,
        "ops/log_linear_attn/naive.py",
        "naive_log_linear_attn",
        lambda f, a: (f(a["q"], a["k"], a["v"], a["g"], a["level_scales"], scale=a["q"].shape[-1] ** -0.5), None),
    ),
    Peer(
        ls.gated_delta_rule,
        "transformers.models.qwen3_next.modeling_qwen3_next",
        "torch_chunk_gated_delta_rule",
        lambda f, a: f(a["q"], a["k"], a["v"], g=a["g"], beta=a["beta"], chunk_size=16, output_final_state=True),
    ),
    Peer(
        ls.kda,
        "transformers.models.kimi_linear.modeling_kimi_linear",
        "chunk_kimi_delta_attention",
        lambda f, a: f(a["q"], a["k"], a["v"], g=a["g"], beta=a["beta"], chunk_size=16, output_final_state=True),
    ),
    Peer(ls.ssd, "transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan", _mamba2),
    Peer(ls.mamba, "transformers.models.mamba.modeling_mamba", "mamba_selective_scan", _mamba),
]


def _retention(function, a):
    return function(*heads_first(a["q"], a["k"], a["v"])).transpose(1, 2)


def load(peer: Peer) -> Callable:
    """The peer's function in plain PyTorch; skips the test where it is not installed."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    if peer.where.startswith("transformers"):
        pytest.importorskip("transformers", reason="transformers is not installed")
        if importlib.util.find_spec(peer.where) is None:
            pytest.skip(f"this transformers has no {peer.where}")
        return inspect.unwrap(getattr(importlib.import_module(peer.where), peer.function))
    package = importlib.util.find_spec("fla")
    if package is None:
        pytest.skip("flash-linear-attention is not installed")
    pytest.importorskip("einops", reason="einops, which flash-linear-attention's references use, is not installed")
    path = pathlib.Path(package.submodule_search_locations[0]) / peer.where
    spec = importlib.util.spec_from_file_location(f"peer_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, peer.function)


def required(operator: ls.Operator) -> list[str]:
    """Arguments that a peer knows too: `D`, the skip connection, is a layer's there."""
    return [name for name, spec in operator.arguments.items() if not spec.optional or name == "g"]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: f"{peer.operator.name}-{peer.where.split('.')[0][:12]}")
def test_peer(peer):
    function = load(peer)
    import torch

    operator = peer.operator
    drawn = operator.example(jax.random.key(0), **SIZES)
    args = {name: np.asarray(drawn[name]) for name in required(operator)}

    theirs = {name: torch.tensor(x, requires_grad=True) for name, x in args.items()}
    o, state = peer.call(function, theirs)
    rng = np.random.default_rng(0)
    d_o = rng.normal(size=o.shape).astype(np.float32)
    d_state = None if state is None else rng.normal(size=state.shape).astype(np.float32)
    loss = (o * torch.tensor(d_o)).sum()
    if state is not None:
        loss = loss + (state * torch.tensor(d_state)).sum()
    loss.backward()

    @jax.jit
    def ours(args):
        def value(args):
            o, state = operator(**args, chunk_size=16)
            total = (o * d_o).sum()
            return (total if d_state is None else total + (state * d_state).sum()), (o, state)

        gradients, out = jax.grad(value, has_aux=True)(args)
        return out, gradients

    (our_o, our_state), gradients = ours({name: jnp.asarray(x) for name, x in args.items()})
    assert_close(our_o, o.detach().numpy(), OUTPUTS["float32"], "outputs")
    if state is not None:
        assert_close(our_state, state.detach().numpy(), OUTPUTS["float32"], "final state")
    wanted = {name: x.grad.numpy() for name, x in theirs.items()}
    assert_close(gradients, wanted, GRADIENTS["float32"], "gradients")
