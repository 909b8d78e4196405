"""Generated from the registry by `python -m tests.typing.stub`; a test fails where it is not up to date."""

from collections.abc import Sequence
from typing import Literal

from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from ..core.operator import Operator
from ..core.typing import State
from .lightnet import lightnet_2d as lightnet_2d

_Form = Literal["chunk", "scan"]
_Implementation = Literal["xla", "mosaic_tpu", "mosaic_gpu"]
_Strategy = Literal["all_gather", "ring", "tree", "all_scan"]

RECURRENCES: dict[str, Operator]

class _linear_attention(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
        causal: bool = True,
        block_size: int | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """Linear attention: S_t = S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

        Feature maps of q and k are the caller's; there is no denominator. `causal=False` reads every token of the
        document.

        Source: Katharopoulos et al. 2020, arXiv:2006.16236, eq. 9-12 without the normaliser; Qin et al. 2022,
        arXiv:2210.10340 (NormAttention).
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of linear_attention: arguments without their T axis, the state as a call returns it."""

linear_attention: _linear_attention

class _normalized_linear_attention(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
        causal: bool = True,
        block_size: int | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """Normalised linear attention: o_t = q_t S_t / (q_t · z_t),  S_t = S_{t-1} + k_t v_t^T,  z_t = z_{t-1} + k_t.

        A mean of the values with weights q_t · k_j. Feature maps are the caller's and must leave q, k >= 0, which
        nothing checks: with signs the denominator can vanish. 1e-12 is added to it. A scale of q would cancel, so
        there is none. The state is the pair (S, z).

        Source: Katharopoulos et al. 2020, arXiv:2006.16236, eq. 9-12; T2R arXiv:2103.13076; Hedgehog
        arXiv:2402.04347.
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of normalized_linear_attention: arguments without their T axis, the state as a call returns it."""

normalized_linear_attention: _normalized_linear_attention

class _retention(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
        causal: bool = True,
        block_size: int | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """Retention: S_t = gamma_h S_{t-1} + k_t v_t^T,  o_t = q_t S_t,  gamma_h = 1 - 2^(-5-h) for head h = 0..HV-1.

        Source: Sun et al. 2023 (RetNet), arXiv:2307.08621, eq. 5-7 and the decays of section 3.
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of retention: arguments without their T axis, the state as a call returns it."""

retention: _retention

class _lightning_attention(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        slopes: Float[ArrayLike, " HV"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
        causal: bool = True,
        block_size: int | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """Lightning attention: S_t = exp(-s_h) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

        One fixed decay per value head, given by its slope s_h >= 0. Slopes differ between models (`alibi_slopes`
        scaled by depth in TransNormerLLM, other formulas elsewhere): take a checkpoint's own. Feature maps of q and
        k are the caller's.

        Source: Qin et al. 2024 (Lightning Attention-2), arXiv:2401.04658, section 3 (our exp(-s) is their lambda).
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        slopes: Float[ArrayLike, " HV"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of lightning_attention: arguments without their T axis, the state as a call returns it."""

lightning_attention: _lightning_attention

class _simple_gla(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        g: Float[ArrayLike, "B T HV"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
        causal: bool = True,
        block_size: int | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """Linear attention with one decay per head and token: S_t = exp(g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

        g is the natural log of the decay, <= 0. The core of Mamba-2 (q = C, k = B, v = dt x, g = dt A) and of gated
        RetNet.

        Source: Dao & Gu 2024, arXiv:2405.21060, section 5 and 6 (scalar-identity SSD).
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        g: Float[ArrayLike, "B HV"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of simple_gla: arguments without their T axis, the state as a call returns it."""

simple_gla: _simple_gla

class _ssd(Operator):
    def __call__(
        self,
        x: Float[ArrayLike, "B T HV V"],
        dt: Float[ArrayLike, "B T HV"],
        A: Float[ArrayLike, " HV"],
        B: Float[ArrayLike, "B T H K"],
        C: Float[ArrayLike, "B T H K"],
        D: Float[ArrayLike, " HV"] | None = None,
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """State space duality (Mamba-2): S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T,  y_t = C_t S_t + D x_t.

        Mamba-2's names for scalar-decay linear attention: q = C, k = B, v = dt x, g = dt A. dt > 0 is the step after
        softplus and bias, A < 0 is -exp(A_log), both per value head; the H heads of B and C are Mamba-2's groups.
        There is no scale.

        Source: Dao & Gu 2024, arXiv:2405.21060, eq. 1 with a scalar times the identity for A (section 5).
        """

    def step(
        self,
        x: Float[ArrayLike, "B HV V"],
        dt: Float[ArrayLike, "B HV"],
        A: Float[ArrayLike, " HV"],
        B: Float[ArrayLike, "B H K"],
        C: Float[ArrayLike, "B H K"],
        D: Float[ArrayLike, " HV"] | None = None,
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of ssd: arguments without their T axis, the state as a call returns it."""

ssd: _ssd

class _gla(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        g: Float[ArrayLike, "B T HV K"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """Gated linear attention: S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t.

        g is the natural log of the decay of each key channel, <= 0.

        Source: Yang et al. 2023, arXiv:2312.06635, eq. 3 (our g is the log of their alpha).
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        g: Float[ArrayLike, "B HV K"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of gla: arguments without their T axis, the state as a call returns it."""

gla: _gla

class _hgrn2(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        g: Float[ArrayLike, "B T H K"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """HGRN-2: S_t = diag(exp g_t) S_{t-1} + (1 - exp g_t) v_t^T,  o_t = q_t S_t.

        Gated linear attention whose keys are what its forget gates let go of: k = 1 - exp g. g is the natural log of
        the decay of each key channel, <= 0, and belongs to the key heads. A layer's lower bound of the decay is part
        of g.

        Source: Qin et al. 2024, arXiv:2404.07904, section 3 (our exp g is their forget gate).
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        g: Float[ArrayLike, "B H K"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of hgrn2: arguments without their T axis, the state as a call returns it."""

hgrn2: _hgrn2

class _rwkv6(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        g: Float[ArrayLike, "B T HV K"],
        u: Float[ArrayLike, "H K"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """RWKV-6: o_t = q_t (S_{t-1} + diag(u) k_t v_t^T),  S_t = diag(exp g_t) S_{t-1} + k_t v_t^T.

        A query reads the state before its token, and the token itself through the bonus u per key channel instead. q
        is RWKV's receptance r, g the natural log of its decay w, <= 0 (-exp of the low-rank projection). scale is 1
        by default.

        Source: Peng et al. 2024 (Eagle and Finch), arXiv:2404.05892, the WKV recurrence of Finch.
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        g: Float[ArrayLike, "B HV K"],
        u: Float[ArrayLike, "H K"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of rwkv6: arguments without their T axis, the state as a call returns it."""

rwkv6: _rwkv6

class _lightnet(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
        causal: bool = True,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """LightNet, additive: S_t = sum_{j<=t} exp(k_j - z_t) v_j^T,  z_t = log sum_{j<=t} exp k_j,  o_t = q_t S_t.

        Every key channel holds a mean of the values seen, weighted by the softmax of the keys. k is raw: logits of
        any size, and -1e30 masks its token. Nothing depends on the order of the past, so with `causal=False` every
        token reads the softmax over its whole document, in one pass. The state is the pair (z, S), with z = -1e30
        where nothing was seen.

        Source: Qin et al. 2024, arXiv:2405.21022, section 3 (additive linear recurrence).
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of lightnet: arguments without their T axis, the state as a call returns it."""

lightnet: _lightnet

class _delta_rule(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        beta: Float[ArrayLike, "B T HV"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """The delta rule: S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = q_t S_t.

        Keys are the caller's to normalise: with |k| = 1 the transition's eigenvalues are 1 and 1 - beta, so beta in
        [0, 2] keeps it from growing.

        Source: Schlag et al. 2021, arXiv:2102.11174, eq. 24; chunk form Yang et al. 2024, arXiv:2406.06484, section
        3.
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        beta: Float[ArrayLike, "B HV"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of delta_rule: arguments without their T axis, the state as a call returns it."""

delta_rule: _delta_rule

class _gated_delta_rule(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        g: Float[ArrayLike, "B T HV"],
        beta: Float[ArrayLike, "B T HV"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """The gated delta rule: S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = q_t S_t.

        g is the natural log of the head's decay, <= 0. Keys are the caller's to normalise.

        Source: Yang et al. 2024, arXiv:2412.06464, eq. 10 (our exp g is their alpha).
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        g: Float[ArrayLike, "B HV"],
        beta: Float[ArrayLike, "B HV"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of gated_delta_rule: arguments without their T axis, the state as a call returns it."""

gated_delta_rule: _gated_delta_rule

class _gated_delta_product(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T NH H K"],
        v: Float[ArrayLike, "B T NH HV V"],
        g: Float[ArrayLike, "B T HV"] | None,
        beta: Float[ArrayLike, "B T NH HV"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """Gated DeltaProduct: every token decays the state once and takes NH steps of the delta rule.

        S = exp(g_t) S_{t-1}; S = (I - beta_i k_i k_i^T) S + beta_i k_i v_i^T for i = 1..NH; S_t = S; o_t = q_t S_t

        With |k| = 1 and beta in (0, 2) a step's eigenvalue along its key is in (-1, 1); beta = 2 reflects, and
        products of reflections are the rotations and permutations that follow a finite group's state. g [B, T, HV]
        is the natural log of the decay, <= 0; None is no decay. Internally a token is NH micro-steps in a row, and
        `chunk_size` counts those.

        Source: Siems et al. 2025 (DeltaProduct), arXiv:2502.10297, section 3; the gate as in arXiv:2412.06464.
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B NH H K"],
        v: Float[ArrayLike, "B NH HV V"],
        g: Float[ArrayLike, "B HV"] | None,
        beta: Float[ArrayLike, "B NH HV"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of gated_delta_product: arguments without their T axis, the state as a call returns it."""

gated_delta_product: _gated_delta_product

class _kda(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        g: Float[ArrayLike, "B T HV K"],
        beta: Float[ArrayLike, "B T HV"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """Kimi delta attention: S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,  o_t = q_t S_t.

        The gated delta rule with one decay per key channel: g is its natural log, <= 0. Keys are the caller's to
        normalise.

        Source: Kimi Team 2025 (Kimi Linear), arXiv:2510.26692, section 3 (our exp g is their alpha).
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        g: Float[ArrayLike, "B HV K"],
        beta: Float[ArrayLike, "B HV"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of kda: arguments without their T axis, the state as a call returns it."""

kda: _kda

class _gdn2(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        g: Float[ArrayLike, "B T HV K"],
        b: Float[ArrayLike, "B T HV K"],
        w: Float[ArrayLike, "B T HV V"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """The gated delta rule 2: S_t = (I - k_t (b_t * k_t)^T) diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T, o_t = q_t
        S_t.

        Erasing and writing have gates of their own: b per key channel, w per value channel; b = w = beta is Kimi
        delta attention. g is the natural log of each key channel's decay, <= 0. Keys are the caller's to normalise;
        with |k| = 1 and b in [0, 1] the transition's eigenvalues stay in [0, 1], but it is not symmetric and may
        lengthen a vector for a while.

        Source: Hatamizadeh et al. 2026 (Gated DeltaNet-2), arXiv:2605.22791, the Gated Delta Rule-2 recurrence (our
        exp g is the diagonal of their D).
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        g: Float[ArrayLike, "B HV K"],
        b: Float[ArrayLike, "B HV K"],
        w: Float[ArrayLike, "B HV V"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of gdn2: arguments without their T axis, the state as a call returns it."""

gdn2: _gdn2

class _rwkv7(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        g: Float[ArrayLike, "B T HV K"],
        a: Float[ArrayLike, "B T HV K"],
        b: Float[ArrayLike, "B T HV K"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """RWKV-7: S_t = diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,  o_t = q_t S_t.

        The transition is diagonal plus low rank, and a reads the state before it decays. In RWKV-7's terms a =
        -kappa and b = kappa * eta, with |kappa| = 1 the removal key and eta in (0, 1) its rates; q is the receptance
        r, and g <= 0 the natural log of the decay w. The caller must choose a and b so that the transition does not
        grow. scale is 1 by default.

        Source: Peng et al. 2025 (RWKV-7), arXiv:2503.14456, the evolution of its weighted key value state.
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        g: Float[ArrayLike, "B HV K"],
        a: Float[ArrayLike, "B HV K"],
        b: Float[ArrayLike, "B HV K"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of rwkv7: arguments without their T axis, the state as a call returns it."""

rwkv7: _rwkv7

class _mlstm(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        i: Float[ArrayLike, "B T HV"],
        f: Float[ArrayLike, "B T HV"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """mLSTM: C_t = f_t C_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t,  o_t = q_t C_t / max(|q_t · n_t|, 1).

        The gates are given as logarithms: `i` is the log of the input gate, of any size; `f` the log of the forget
        gate, <= 0 (logsigmoid of its pre-activation). The state is the triple (C, n, m) whose true value is (C exp
        m, n exp m): m is the largest log-weight so far, -1e30 where nothing was seen. It is a constant to gradients,
        which is exact for whatever depends on the true state only, such as the outputs.

        Source: Beck et al. 2024 (xLSTM), arXiv:2405.04517, section 2.3, stabilised as in eq. 15.
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        i: Float[ArrayLike, "B HV"],
        f: Float[ArrayLike, "B HV"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of mlstm: arguments without their T axis, the state as a call returns it."""

mlstm: _mlstm

class _hgrn(Operator):
    def __call__(
        self,
        x: Float[ArrayLike, "B T D"],
        g: Float[ArrayLike, "B T D"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        """HGRN: h_t = exp(g_t) h_{t-1} + x_t, elementwise, and the output is h_t.

        g is the natural log of the decay of each channel, <= 0. HGRN's input is x_t = (1 - exp g_t) i_t; any other
        gives any elementwise recurrence.

        Source: Qin et al. 2023, arXiv:2311.04823, section 3 (our exp g is their forget gate; real-valued).
        """

    def step(
        self,
        x: Float[ArrayLike, "B D"],
        g: Float[ArrayLike, "B D"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B D"], State]:
        """One token of hgrn: arguments without their T axis, the state as a call returns it."""

hgrn: _hgrn

class _rg_lru(Operator):
    def __call__(
        self,
        x: Float[ArrayLike, "B T D"],
        r: Float[ArrayLike, "B T D"],
        i: Float[ArrayLike, "B T D"],
        Lambda: Float[ArrayLike, " D"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        """RG-LRU: h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t),  log a_t = -8 r_t softplus(Lambda), elementwise.

        r and i are the recurrence gate and the input gate after their sigmoids. Lambda is the parameter of the
        decays, shared by all tokens. The first token of a document has no past that its input must make room for, so
        its multiplier is 1 in place of the square root. The first token of a call is such a token unless
        `initial_state` is given: any state, even zeros, says that the document began earlier.

        The derivative of the square root is bounded by 1000, because it is infinite at a_t = 1.

        Source: De et al. 2024 (Griffin), arXiv:2402.19427, eq. 1-4 (our softplus(Lambda) is their -log a).
        """

    def step(
        self,
        x: Float[ArrayLike, "B D"],
        r: Float[ArrayLike, "B D"],
        i: Float[ArrayLike, "B D"],
        Lambda: Float[ArrayLike, " D"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B D"], State]:
        """One token of rg_lru: arguments without their T axis, the state as a call returns it."""

rg_lru: _rg_lru

class _mamba(Operator):
    def __call__(
        self,
        u: Float[ArrayLike, "B T D"],
        dt: Float[ArrayLike, "B T D"],
        A: Float[ArrayLike, "D N"],
        B: Float[ArrayLike, "B T N"],
        C: Float[ArrayLike, "B T N"],
        D: Float[ArrayLike, " D"] | None = None,
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mamba: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = h_t C_t + D u_t, with N states for each of D channels.

        dt > 0 is the step after bias and softplus, A < 0 is -exp(A_log). dt, B and C say how u is taken in and read
        out, and may be computed from u's stream or from any other of the same length (TrackSSM's Flow-SSM: from the
        flow feature, with the state handed from layer to layer). The decay has no axis that a query and a key could
        share, so there is no matrix form; the chunks' states [C, D, N] exist one chunk at a time.

        Source: Gu & Dao 2023, arXiv:2312.00752, eq. 2a and algorithm 2 (B discretised as dt B).
        """

    def step(
        self,
        u: Float[ArrayLike, "B D"],
        dt: Float[ArrayLike, "B D"],
        A: Float[ArrayLike, "D N"],
        B: Float[ArrayLike, "B N"],
        C: Float[ArrayLike, "B N"],
        D: Float[ArrayLike, " D"] | None = None,
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B D"], State]:
        """One token of mamba: arguments without their T axis, the state as a call returns it."""

mamba: _mamba

class _log_linear_attention(Operator):
    def __call__(
        self,
        q: Float[ArrayLike, "B T H K"],
        k: Float[ArrayLike, "B T H K"],
        v: Float[ArrayLike, "B T HV V"],
        g: Float[ArrayLike, "B T HV"],
        level_scales: Float[ArrayLike, "B T HV L"],
        *,
        scale: float | None = None,
        initial_state: State | None = None,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        form: _Form = "chunk",
        chunk_size: int | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
        axis_name: str | None = None,
        strategy: _Strategy | None = None,
    ) -> tuple[Float[Array, "B T HV V"], State]:
        """Log-linear attention: o_t = sum_l s_t^(l) q_t S_t^(l), with a state per level of a Fenwick partition of the
        past.

        For token t, token t itself is on level 0, and an earlier token j on level bitlength(t xor j). So the recent
        past lies in small pieces and the distant past in large ones. The state of a level is S^(l) = sum_j
        exp(g_{j+1} + ... + g_t) k_j v_j^T over its tokens, with g <= 0 the log-decay of the head. `level_scales` s
        weighs the L levels. T tokens fill bitlength(T - 1) + 1 levels; with fewer of them, the last level holds all
        that is older.

        The state is the pair (S, count). S holds the levels above 0, or one where there are no others, because level
        0 is empty between two tokens. Read the number of tokens seen in binary: level l holds 2^(l-1) tokens if bit
        l-1 is 1, and none if it is 0. One more token adds 1, and the levels whose bits the carry clears are added up
        into the next one. `count` is the number modulo 2^(L-2), the bits of all levels but the last.

        Source: Guo et al. 2025, arXiv:2506.04761, sections 2 and 3.
        """

    def step(
        self,
        q: Float[ArrayLike, "B H K"],
        k: Float[ArrayLike, "B H K"],
        v: Float[ArrayLike, "B HV V"],
        g: Float[ArrayLike, "B HV"],
        level_scales: Float[ArrayLike, "B HV L"],
        *,
        state: State | None = None,
        scale: float | None = None,
        implementation: _Implementation | Sequence[_Implementation] | None = None,
    ) -> tuple[Float[Array, "B HV V"], State]:
        """One token of log_linear_attention: arguments without their T axis, the state as a call returns it."""

log_linear_attention: _log_linear_attention
