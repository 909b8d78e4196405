"""What an argument that is left out means."""

import jax
import jax.numpy as jnp
from tolerances import OUTPUTS, assert_close

import lineax_seq as ls

SIZES = dict(B=1, T=20, H=1, HV=2, K=4, V=4, dtype=jnp.float64)
EXACT = OUTPUTS["float64"]


def test_one_step_without_a_decay_is_the_delta_rule(x64):
    args = ls.gated_delta_product.example(jax.random.key(0), NH=1, **SIZES)
    del args["g"]
    one = {name: x if name == "q" else x[:, :, 0] for name, x in args.items()}
    want = ls.delta_rule(**one, form="scan")
    scan = ls.gated_delta_product(args["q"], args["k"], args["v"], None, args["beta"], form="scan")
    assert_close(ls.gated_delta_product(**args), want, EXACT, "chunk")
    assert_close(scan, want, EXACT, "scan")
    token = {name: x[:, 0] for name, x in args.items()}
    assert_close(ls.gated_delta_product.step(**token)[0], want[0][:, 0], EXACT, "step")


def test_no_skip_is_a_skip_of_zero(x64):
    args = ls.ssd.example(jax.random.key(0), **SIZES)
    want = ls.ssd(**{**args, "D": jnp.zeros_like(args["D"])}, form="scan")
    del args["D"]
    assert_close(ls.ssd(**args, form="scan"), want, EXACT)
