"""What an argument that is left out means."""

import jax
import jax.numpy as jnp
import numpy as np

import lineax_seq as ls

SIZES = dict(B=1, T=20, H=1, HV=2, K=4, V=4)


def same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_one_step_without_a_decay_is_the_delta_rule():
    args = ls.gated_delta_product.example(jax.random.key(0), NH=1, **SIZES)
    del args["g"]
    one = {name: x if name == "q" else x[:, :, 0] for name, x in args.items()}
    want = ls.delta_rule(**one, form="scan")
    same(ls.gated_delta_product(**args), want)
    same(ls.gated_delta_product(args["q"], args["k"], args["v"], None, args["beta"], form="scan"), want)
    token = {name: x[:, 0] for name, x in args.items()}
    same(ls.gated_delta_product.step(**token)[0], want[0][:, 0])


def test_no_skip_is_a_skip_of_zero():
    args = ls.ssd.example(jax.random.key(0), **SIZES)
    want = ls.ssd(**{**args, "D": jnp.zeros_like(args["D"])}, form="scan")
    del args["D"]
    same(ls.ssd(**args, form="scan"), want)
