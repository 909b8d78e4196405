"""The same recurrences in other JAX packages, where they are installed; for benchmarks only.

Each entry maps one of our names to a builder of `fn(**arguments) -> o` on our arguments. None of them is a dependency:
`pip install --no-deps --ignore-requires-python jax-linear-attention equinox deltanet-tpu mamba2-jax` into the
environment, or into a folder that `--peers-path` names, brings those that are known here.
"""

import importlib.util
from collections.abc import Callable


def _jla(kind: str, rename: Callable[[dict], tuple[tuple, dict]]) -> Callable:
    def build():
        from jla import ops

        def fn(**a):
            args, kwargs = rename(a)
            return ops.linear_attention(kind, *args, impl="chunked", output_final_state=True, **kwargs)[0]

        return fn

    return build


def _qkv(*names: str) -> Callable[[dict], tuple[tuple, dict]]:
    return lambda a: ((a["q"], a["k"], a["v"]), {name: a[name] for name in names})


def _ssd_of_jla(a: dict) -> tuple[tuple, dict]:
    return (a["C"], a["B"], a["dt"][..., None] * a["x"]), {"g": a["dt"] * a["A"], "scale": 1.0}


def _deltanet_tpu(function: str, *names: str) -> Callable:
    def build():
        import deltanet_tpu

        call = getattr(deltanet_tpu, function)

        def fn(**a):
            out = call(a["q"], a["k"], a["v"], *(a[name] for name in names), precision="fp32", fallback_scan=True)
            return out[0] if isinstance(out, tuple) else out

        return fn

    return build


def _mamba2_jax():
    import jax.numpy as jnp
    from mamba2_jax.modeling import ssd_forward

    def fn(**a):
        heads = a["dt"].shape[-1]
        dt = jnp.log(jnp.expm1(a["dt"]))  # it applies the softplus itself
        zeros = jnp.zeros(heads)
        return ssd_forward(a["x"], dt, a["A"], a["B"], a["C"], 256, zeros, zeros, 0.0, float("inf"))[0]

    return fn


# our name -> (peer, its module, builder)
PEERS = {
    "simple_gla": [("jax-linear-attention", "jla", _jla("simple_gla", _qkv("g")))],
    "ssd": [
        ("jax-linear-attention", "jla", _jla("simple_gla", _ssd_of_jla)),
        ("mamba2-jax", "mamba2_jax", _mamba2_jax),
    ],
    "gla": [
        ("jax-linear-attention", "jla", _jla("gla", _qkv("g"))),
        ("deltanet-tpu", "deltanet_tpu", _deltanet_tpu("chunk_gla", "g")),
    ],
    "delta_rule": [("jax-linear-attention", "jla", _jla("deltanet", _qkv("beta")))],
    "gated_delta_rule": [
        ("jax-linear-attention", "jla", _jla("gated_deltanet", _qkv("g", "beta"))),
        ("deltanet-tpu", "deltanet_tpu", _deltanet_tpu("chunk_gdn", "g", "beta")),
    ],
    "kda": [
        ("jax-linear-attention", "jla", _jla("kda", _qkv("g", "beta"))),
        ("deltanet-tpu", "deltanet_tpu", _deltanet_tpu("chunk_kda", "g", "beta")),
    ],
}


def installed(name: str) -> dict[str, Callable]:
    """peer -> `fn(**arguments) -> o`, for the peers of recurrence `name` that can be imported."""
    return {
        peer: build() for peer, module, build in PEERS.get(name, ()) if importlib.util.find_spec(module) is not None
    }
