"""The public callable of a recurrence: checks its arguments, then runs the form that they ask for."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import arguments as _arguments, checks, dispatch, documentation, lowering
from .arguments import Argument
from .documentation import OPTIONS
from .lowering import How
from .recurrence import Recurrence
from .target import Target, target_here
from .typing import State

FORMS = ("chunk", "scan")


class Checked(NamedTuple):
    """The arguments and options of a call that has passed all checks."""

    target: Target
    xs: dict
    segment_ids: jax.Array | None
    state: State | None
    scale: float | None
    chunk_size: int
    implementations: tuple[str, ...]
    options: dict

    def how(self, operator: "Operator", implementation: str) -> How:
        """What is static in the call, for one implementation. A kernel has a chunk size of its own, so it is told one
        only where the caller names it."""
        options = self.options
        return How(
            operator=operator,
            target=self.target,
            implementation=implementation,
            form=options["form"],
            scale=self.scale,
            chunk_size=self.chunk_size if implementation == "xla" else options["chunk_size"],
            causal=options["causal"],
            block_size=options["block_size"],
            axis_name=options["axis_name"],
            strategy=options["strategy"],
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """A recurrence as users call it: a record, and the arguments that it is called with.

    Attributes:
        name: the public name.
        recurrence: the record that computes it.
        arguments: the public arguments in calling order: name -> dimensions and domain.
        about: the first part of the docstring: the equations and their source.
        lower: arguments -> the record's fields, where the two differ; None where they are the same.
        finish: (outputs of the record, arguments) -> outputs of the call, where something is added to what the record
            gives; None where nothing is. `finish` brings the outputs to their dtype.
        scaled: whether the queries, the field q, are multiplied by a scale.
        default_scale: the scale of a call that names none; None stands for K**-0.5.
        bidirectional: (target, scale, chunk size, fields, reset, state, starts) -> (final state, o), which computes
            calls with `causal=False` and with `block_size=`. `starts` is None, or bool [B, T]: True at the first token
            of every block of tokens that read each other. None where tokens can only read the past.
        takes_blocks: whether `bidirectional` understands `starts`, so that `block_size=` is accepted.
        order_free: whether the state does not depend on the order of the tokens. With `causal=False` every token then
            reads the final state, and shards of T need no more than that state.
        numbers_heads: whether `lower` must know which of all value heads is the first one in its arrays. It finds the
            number under the name `first_head`; on a mesh that splits heads it differs between devices.
        zero_is_identity: whether a token whose arguments are all zero leaves the state alone.
        seen: (state, or None) -> how many tokens of the current document have gone into the state, an int or `[B]`.
            Where it is given, `lower` finds each token's place in its document, int `[B, T]` from 0, under the name
            `position`. None where no token needs its place.
        logs: arguments that are logarithms, where -inf is a number like any other.
        queries: arguments that a token reads the state with. No other token sees them.
        state: the shape of the state, for the docstring.
        default_chunk_size: C of a call that names none.
        cpu_chunk_size: the same on a CPU, if another size is faster there; None if not.
    """

    name: str
    recurrence: Recurrence
    arguments: Mapping[str, Argument]
    about: str = ""
    lower: Callable[[dict], dict] | None = None
    finish: Callable[[jax.Array, dict], jax.Array] | None = None
    scaled: bool = True
    default_scale: float | None = None
    bidirectional: Callable | None = None
    takes_blocks: bool = False
    order_free: bool = False
    numbers_heads: bool = False
    zero_is_identity: bool = True
    seen: Callable[[State | None], jax.Array | int] | None = None
    logs: tuple[str, ...] = ("g",)
    queries: tuple[str, ...] = ("q",)
    state: str = "[B, HV, K, V]"
    default_chunk_size: int = 64
    cpu_chunk_size: int | None = None

    def __post_init__(self):
        tokens = {name: argument.token() for name, argument in self.arguments.items()}
        for name, value in (
            ("__signature__", documentation.signature(self)),
            ("__doc__", documentation.docstring(self)),
            ("__name__", self.name),
            # `pickle` writes an operator down by its name in a module; None makes `pickle` look for that module.
            ("__module__", None),
            ("_token_arguments", tokens),
            # a function of its own for every operator, so that `help` and editors show its arguments
            ("step", documentation.named_step(self, functools.partial(type(self).step, self))),
        ):
            object.__setattr__(self, name, value)

    def __reduce__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<recurrence {self.name}({', '.join(self.arguments)})>"

    @property
    def output_argument(self) -> str:
        """The argument whose dtype the outputs take, in words."""
        field = self.recurrence.output_field
        return field if field in self.arguments else next(iter(self.arguments))

    # ---- calls

    def __call__(self, *args, **kwargs) -> tuple[jax.Array, State]:
        call = self.checked(args, kwargs)
        place = None
        if call.options["axis_name"] is None and lowering.distribution is not None:
            place = lowering.distribution.placement(self, call.xs, call.segment_ids, call.state)
        attempt = lambda name: lowering.run(  # noqa: E731
            call.how(self, name), place, call.xs, call.segment_ids, call.state
        )
        return dispatch.first_accepting(self.name, call.implementations, attempt)

    def checked(self, args: tuple, kwargs: dict, shards: int = 1) -> Checked:
        """The arguments of a call after all checks.

        Args:
            args, kwargs: as in the call.
            shards: devices that T is split over; the default chunk size depends on the part that one of them has.

        Raises:
            ValueError: as in the call.
        """
        values, options = checks.bind(
            self.name, self.arguments, args, kwargs, {**OPTIONS, "causal": True, "block_size": None}
        )
        xs, dims = checks.arrays(self.name, values, self.arguments)
        scale = self._scale(self.name, options["scale"], dims)
        checks.one_of(self.name, "form", options["form"], FORMS)
        segment_ids = checks.segment_ids(self.name, options["segment_ids"], dims)
        state = options["initial_state"]
        self._check_state(self.name, "initial_state", state, xs)
        target, length = target_here(), dims["T"] // shards
        if options["form"] == "scan" and options["chunk_size"] is None:
            chunk_size = 1
        else:
            default = self.cpu_chunk_size if target.on_cpu and self.cpu_chunk_size else self.default_chunk_size
            chunk_size = checks.chunk_size(self.name, options["chunk_size"], default, length)
        names = dispatch.candidates(self.name, options["implementation"], target.machine)
        if options["strategy"] is not None and options["axis_name"] is None:
            raise ValueError(f"{self.name}: strategy={options['strategy']!r} without axis_name; give it or neither.")
        if options["causal"] is not True or options["block_size"] is not None:
            self._check_directions(options)
        return Checked(target, xs, segment_ids, state, scale, chunk_size, names, options)

    def step(self, *args, state: State | None = None, **kwargs) -> tuple[jax.Array, State]:
        """The output of one token and the state after it: `(o_t, state)`.

        Arguments are those of a call without their T axis. `state` is one that a call or a step returned; None is the
        state that has seen nothing. `implementation` is as in a call, and asks for a kernel of one token.
        """
        caller = f"{self.name}.step"
        values, options = checks.bind(caller, self.arguments, args, kwargs, {"scale": None, "implementation": None})
        xs, dims = checks.arrays(caller, values, self._token_arguments)  # type: ignore[attr-defined]
        scale = self._scale(caller, options["scale"], dims)
        self._check_state(caller, "state", state, xs)
        target = target_here()
        names = dispatch.candidates(caller, options["implementation"], target.machine)
        attempt = lambda name: lowering.run_token(  # noqa: E731
            How(self, target, name, "scan" if name == "xla" else "step", scale), xs, state
        )
        return dispatch.first_accepting(caller, names, attempt)

    # ---- what a caller may want to know or make

    def example(self, key: jax.Array, *, dtype=jnp.float32, **sizes: int) -> dict[str, jax.Array]:
        """Arguments by name, drawn from their domains: `op.example(jax.random.key(0), B=1, T=64, H=2, K=16, V=16)`."""
        return _arguments.draw(self.arguments, key, sizes, dtype)

    def state_shape(self, *, dtype=jnp.float32, **sizes: int) -> State:
        """Shapes and dtypes of the state that `init_state` gives, without making it."""
        return _state_shape(self, self._token_shapes(sizes, dtype))

    def init_state(self, *, B: int, dtype=jnp.float32, **sizes: int) -> State:
        """The state of `B` sequences that have seen nothing: `op.init_state(B=2, H=4, K=16, V=16)`.

        `sizes` gives the letters of the arguments; HV is H where it is not given. float32, or float64 on request.

        Raises:
            ValueError: letters without a size.
        """
        tokens = {name: jnp.zeros(*array) for name, *array in self._token_shapes({"B": B, **sizes}, dtype)}
        return lowering.zero_state(self, self.fields(tokens))

    def _token_shapes(self, sizes: Mapping[str, int], dtype) -> tuple:
        """Name, shape and dtype of every argument that a call needs, for one token."""
        sizes = {"B": 1, "HV": sizes.get("H", 1), "NH": 1, **sizes, "T": 1}
        needed = {name: argument for name, argument in self.arguments.items() if not argument.optional}
        missing = sorted({letter for argument in needed.values() for letter in argument.letters} - sizes.keys())
        if missing:
            raise ValueError(f"{self.name}: no size for {', '.join(missing)}; give each as a keyword.")
        return tuple((name, tuple(sizes[n] for n in a.letters), jnp.dtype(dtype)) for name, a in needed.items())

    def identity_tokens(self, xs: dict, keep: jax.Array) -> dict:
        """The arguments, changed so that the tokens where `keep` (bool [B, T]) is False leave the state alone.

        Raises:
            ValueError: no argument's value makes this recurrence leave its state alone.
        """
        padding = {} if self.zero_is_identity else self.recurrence.padding
        if not self.zero_is_identity and (self.lower is not None or not padding):
            raise ValueError(
                f"{self.name}: no values of {', '.join(self.arguments)} leave its state alone, so rows that end at "
                "different tokens cannot be padded; run rows of one length together."
            )
        return {
            name: jnp.where(keep.reshape(*keep.shape, *[1] * (x.ndim - 2)), x, padding.get(name, 0))
            if self.arguments[name].per_token
            else x
            for name, x in xs.items()
        }

    def fields(
        self,
        xs: dict,
        reset: jax.Array | None = None,
        state: State | None = None,
        seen: jax.Array | None = None,
        first_head: jax.Array | int = 0,
    ) -> dict:
        """The record's fields, made of checked arguments.

        Args:
            xs: the arguments by name.
            reset: None, or bool [B, T]: a document starts here.
            state: that enters; None says that the first token starts a document.
            seen: how many tokens of its document came before the first one; None asks `state`.
            first_head: the number of the first value head in `xs`.
        """
        if self.seen is not None:
            batch, length = xs[next(iter(self.arguments))].shape[:2]
            before = self.seen(state) if seen is None else seen
            xs = {**xs, "position": lowering.positions(before, reset, batch, length)}
        if self.numbers_heads:
            xs = {**xs, "first_head": first_head}
        return xs if self.lower is None else self.lower(xs)

    # ---- checks

    def _check_directions(self, options: dict) -> None:
        block_size, causal = options["block_size"], options["causal"]
        asked = f"causal={causal!r}" if block_size is None else f"block_size={block_size!r}"
        if not isinstance(causal, bool | np.bool_):
            raise ValueError(f"{self.name}: {asked}, wants True or False.")
        options["causal"] = bool(causal)
        if causal and block_size is None:
            return
        if not (self.bidirectional if block_size is None else self.takes_blocks):
            raise ValueError(f"{self.name}: {asked}: this recurrence reads the past only; leave it out.")
        if block_size is not None:
            if not checks.is_integer(block_size) or block_size < 1:
                raise ValueError(f"{self.name}: {asked}, wants a number of tokens of at least 1, or None.")
            options["block_size"] = int(block_size)
            if not causal:
                raise ValueError(f"{self.name}: causal=False is one block for all; leave block_size out, or causal.")
        if options["form"] == "scan":
            raise ValueError(f"{self.name}: {asked} has no token scan; leave form out.")

    def _scale(self, caller: str, scale, dims: dict) -> float | None:
        if not self.scaled:
            if scale is not None:
                raise ValueError(f"{caller}: scale={scale!r}: this recurrence has no scale; leave it out.")
            return None
        if scale is None:
            return dims["K"] ** -0.5 if self.default_scale is None else self.default_scale
        if isinstance(scale, int | float | np.integer | np.floating) and not isinstance(scale, bool):
            return float(scale)
        raise ValueError(f"{caller}: scale is {type(scale).__name__}, wants a Python number; multiply q by it instead.")

    def _check_state(self, caller: str, name: str, state: State | None, xs: dict) -> None:
        """The state has the shapes that the arguments ask for; these may have a T axis or not."""
        if state is None:
            return
        shapes = []
        for argument, x in xs.items():
            shape, letters = x.shape, self.arguments[argument].letters
            if "T" in letters:  # one token has the state of many
                at = letters.index("T")
                shape = (*shape[:at], 1, *shape[at + (x.ndim == len(letters)) :])
            shapes.append((argument, shape, x.dtype))
        checks.state(caller, name, state, _state_shape(self, tuple(shapes)))


@functools.lru_cache(maxsize=4096)
def _state_shape(operator: Operator, shapes: tuple) -> State:
    """The shapes of the state for arguments with these names, shapes and dtypes; cached, as it takes a trace."""
    xs: dict[str, Any] = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes}
    with jax.enable_x64(any(dtype == jnp.float64 for _, _, dtype in shapes)):
        return jax.eval_shape(lambda xs: lowering.zero_state(operator, operator.fields(xs)), xs)
