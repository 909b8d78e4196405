"""The public callable of a recurrence: checks its arguments, lowers them to the record's fields, runs a form."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import arguments as _arguments, checks, dispatch, forms
from .arguments import Argument
from .layout import Layout, compute_dtype
from .recurrence import Recurrence
from .typing import State

FORMS = ("chunk", "scan")
_OPTIONS: dict[str, Any] = dict(
    scale=None,
    initial_state=None,
    segment_ids=None,
    form="chunk",
    chunk_size=None,
    implementation=None,
    axis_name=None,
    strategy=None,
)
_COMMON_DOC = """

Call: `o, final_state = {name}({arguments}, *, scale=None, initial_state=None, segment_ids=None, form="chunk",
chunk_size=None, implementation=None, axis_name=None, strategy=None{directions})`; one token without its T axis:
`o_t, state = {name}.step({arguments}, *, state, scale=None, implementation=None)`.

Args:
{shapes}
    scale: {scale}
    initial_state: {state}, float32; None is the state that has seen nothing, zeros unless said above.
    segment_ids: int [B, T]; the state is reset where the id changes, the initial state enters only the first segment
        and the final state is the last segment's.
    form: "chunk" (chunk-parallel, for training and prefill) or "scan" (token by token, the reference).
    chunk_size: C, a power of two; None is the fastest measured. T need not be divisible by it.
    implementation: None (the fastest that supports platform, shapes and dtype), "xla", "mosaic_tpu", "mosaic_gpu", or
        a sequence tried in order. A named one never falls back.
    axis_name: a mesh axis that T is sharded over, shards in order, inside `jax.shard_map`; initial and final state are
        the whole sequence's, the same on every device of the axis.
    strategy: with `axis_name`, how the shards' summaries get to the others: "all_gather" (LASP-2), "ring" (LASP-1),
        "tree" or "all_scan" (ZeCO); all give the same. None is the cheapest by `parallel.cost`.{directions_doc}

Returns:
    o [B, T, {output}] in the dtype of {output_field}, and the final state in float32 (float64 for float64 inputs).

Raises:
    ValueError: shapes, dtypes or names that do not fit, all offenders at once, before tracing.
    NotImplementedError: a named implementation that cannot, with the reason.
"""
_CAUSAL_DOC = """
    causal: False: every token reads its whole document, the future as the recurrence run backwards in time reads it."""
_BLOCK_DOC = """
    block_size: every token reads its whole block of so many tokens, counted from the document's start, and earlier
        blocks as a causal one does; a state belongs between two blocks. None: blocks of one token."""


class Call(NamedTuple):
    """A call's arguments after the checks."""

    xs: dict
    segment_ids: jax.Array | None
    state: State | None
    scale: float | None
    chunk_size: int
    implementations: tuple[str, ...]
    options: dict

    def chunk_size_of(self, implementation: str) -> int | None:
        """C, or None for kernels where the caller does not say: they have tuned ones of their own."""
        return self.chunk_size if implementation == "xla" else self.options["chunk_size"]


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """A recurrence as users call it.

    Attributes:
        name: the public name.
        recurrence: the record of one head.
        arguments: public name -> dimensions and domain, in calling order.
        about: the docstring's first part: the equations and their source.
        lower: arguments -> the record's fields, for recurrences that are another one in disguise.
        finish: (outputs in the dtype of computation or of v, arguments) -> outputs, for what a disguise adds after
            the recurrence.
        scaled: whether the queries (field q) take a scale.
        default_scale: the scale where the caller does not say; None is K**-0.5.
        bidirectional: None, or (scale, chunk size, fields, reset, state, blocks) -> (final state, o), for
            `causal=False` and, where `takes_blocks`, for `block_size=`; blocks: None or bool [B, T], where they start.
        zero_is_identity: whether a token whose arguments are all zero leaves the state alone.
        order_free: whether the state does not depend on the order of the tokens, so that with `causal=False` every
            token reads the last one.
        numbers_heads: whether `lower` wants to know which value head the first one is, under the name `first_head`:
            not 0 where heads are sharded.
        seen: None, or (state or None) -> int, how many tokens of its document the state has seen, `[B]` or a number;
            `lower` then finds each token's place in its document, int `[B, T]` from 0, under the name `position`.
        state: the state's shape in the documentation.
        default_chunk_size: C where the caller does not say.
        cpu_chunk_size: the same on a CPU, where another one is faster.
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
    state: str = "[B, HV, K, V]"
    default_chunk_size: int = 64
    cpu_chunk_size: int | None = None

    def __post_init__(self):
        options = {**_OPTIONS, **self._directions}
        names = list(self.arguments)
        required = max(i for i, name in enumerate(names) if not self.arguments[name].optional)
        parameters = [
            # None stands in for an optional argument that others follow
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=None if i > required else inspect.Parameter.empty,
            )
            for i, name in enumerate(names)
        ]
        parameters += [inspect.Parameter(o, inspect.Parameter.KEYWORD_ONLY, default=d) for o, d in options.items()]
        doc = self.about + _COMMON_DOC.format(
            name=self.name,
            arguments=", ".join(self.arguments),
            shapes="\n".join(
                f"    {a}: float [{', '.join(arg.letters)}]{', or None' if arg.optional else ''}"
                for a, arg in self.arguments.items()
            ),
            scale=self._scale_doc(),
            state=self.state,
            output=self.recurrence.fields[self.recurrence.output_field].replace(" ", ", "),
            output_field=self._output_argument(),
            directions="".join(f", {name}={value}" for name, value in self._directions.items()),
            directions_doc=(_CAUSAL_DOC if self.bidirectional else "") + (_BLOCK_DOC if self.takes_blocks else ""),
        )
        object.__setattr__(self, "__signature__", inspect.Signature(parameters))
        object.__setattr__(self, "__doc__", doc)
        object.__setattr__(self, "__name__", self.name)

    @property
    def _directions(self) -> dict:
        return ({"causal": True} if self.bidirectional else {}) | ({"block_size": None} if self.takes_blocks else {})

    @property
    def chunk_size_here(self) -> int:
        """C where the caller does not say, on this platform."""
        on_cpu = jax.default_backend() == "cpu"
        return self.cpu_chunk_size if on_cpu and self.cpu_chunk_size else self.default_chunk_size

    def __repr__(self) -> str:
        return f"<recurrence {self.name}({', '.join(self.arguments)})>"

    def __call__(self, *args, **kwargs) -> tuple[jax.Array, State]:
        call = self.checked(args, kwargs)
        options, block_size = call.options, call.options["block_size"]
        if options["axis_name"] is not None:
            from ..parallel import sequence

            run = lambda name: sequence.on_shard(self, name, call)  # noqa: E731
        elif not options["causal"] or block_size is not None:
            run = lambda name: _bidirectional(  # noqa: E731
                self, name, call.scale, call.chunk_size, block_size, call.xs, call.segment_ids, call.state
            )
        elif options["form"] == "scan":
            return _scan(self, call.scale, call.xs, call.segment_ids, call.state)
        else:
            run = lambda name: _chunk(  # noqa: E731
                self, name, call.scale, call.chunk_size_of(name), call.xs, call.segment_ids, call.state
            )
        return dispatch.first_accepting(self.name, call.implementations, run)

    def checked(self, args: tuple, kwargs: dict, shards: int = 1) -> "Call":
        """A call's arguments, found to be right; `shards` of T are computed one on each device.

        Raises:
            ValueError: as the call.
        """
        values, options = checks.bind(
            self.name, self.arguments, args, kwargs, {**_OPTIONS, "causal": True, "block_size": None}
        )
        xs, dims = checks.arrays(self.name, values, self.arguments)
        scale = self._scale(self.name, options["scale"], dims)
        checks.one_of(self.name, "form", options["form"], FORMS)
        segment_ids, state = options["segment_ids"], options["initial_state"]
        checks.segment_ids(self.name, segment_ids, dims)
        self._check_state(self.name, "initial_state", state, xs)
        length = max(1, dims["T"] // shards)
        chunk_size = checks.chunk_size(self.name, options["chunk_size"], self.chunk_size_here, length)
        names = dispatch.candidates(self.name, options["implementation"])
        if options["strategy"] is not None and options["axis_name"] is None:
            raise ValueError(f"{self.name}: strategy={options['strategy']!r} without axis_name; give it or neither.")
        if not options["causal"] or options["block_size"] is not None:
            self._check_directions(options)
        return Call(xs, segment_ids, state, scale, chunk_size, names, options)

    def step(self, *args, state: State | None = None, **kwargs) -> tuple[jax.Array, State]:
        """One token: arguments without their T axis, `state` as a call returns it (None: zeros). Gives (o_t, state).

        `implementation` as in a call: a kernel for one token, where there is one.
        """
        caller = f"{self.name}.step"
        values, options = checks.bind(caller, self.arguments, args, kwargs, {"scale": None, "implementation": None})
        xs, dims = checks.arrays(caller, values, {name: arg.token() for name, arg in self.arguments.items()})
        scale = self._scale(caller, options["scale"], dims)
        tokens = {name: x[:, None] if self.arguments[name].per_token else x for name, x in xs.items()}
        self._check_state(caller, "state", state, tokens)
        names = dispatch.candidates(caller, options["implementation"])
        run = lambda name: _step(self, name, scale, tokens, state)  # noqa: E731
        o, final = dispatch.first_accepting(caller, names, run)
        return o[:, 0], final

    def example(self, key: jax.Array, *, dtype=jnp.float32, **sizes: int) -> dict[str, jax.Array]:
        """Arguments by name drawn from their domains: `op.example(jax.random.key(0), B=1, T=64, H=2, K=16, V=16)`."""
        return _arguments.draw(self.arguments, key, sizes, dtype)

    def init_state(self, *, B: int, dtype=jnp.float32, **sizes: int) -> State:
        """The state of `B` sequences that have seen nothing: `op.init_state(B=2, H=4, K=16, V=16)`.

        `sizes` gives the letters of the arguments; HV is H where it is not given. float32, or float64 on request.

        Raises:
            ValueError: letters without a size.
        """
        sizes = {"HV": sizes.get("H", 1), "NH": 1, **sizes, "B": B, "T": 1}
        needed = [argument for argument in self.arguments.values() if not argument.optional]
        missing = sorted({letter for argument in needed for letter in argument.letters} - sizes.keys())
        if missing:
            raise ValueError(f"{self.name}.init_state: no size for {', '.join(missing)}; give each as a keyword.")
        xs = {
            name: jnp.zeros([sizes[letter] for letter in argument.letters], dtype)
            for name, argument in self.arguments.items()
            if not argument.optional
        }
        return _zero_state(self, self.fields(xs))

    def identity_tokens(self, xs: dict, keep: jax.Array) -> dict:
        """Arguments by name whose tokens leave the state alone where `keep` (bool [B, T]) is False.

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
        """The record's fields from checked arguments; `reset` and `state` say which token starts a document.

        `seen`: how many tokens of its document came before the first one, where `state` does not say it.
        """
        if self.seen is not None:
            batch, length = xs[next(iter(self.arguments))].shape[:2]
            xs = {**xs, "position": _positions(self.seen(state) if seen is None else seen, reset, batch, length)}
        if self.numbers_heads:
            xs = {**xs, "first_head": first_head}
        return xs if self.lower is None else self.lower(xs)

    def _output_argument(self) -> str:
        """The argument whose dtype the outputs take, in words."""
        field = self.recurrence.output_field
        return field if field in self.arguments else next(iter(self.arguments))

    def _check_directions(self, options: dict) -> None:
        block_size = options["block_size"]
        asked = "causal=False" if block_size is None else f"block_size={block_size!r}"
        if not (self.bidirectional if block_size is None else self.takes_blocks):
            raise ValueError(f"{self.name}: {asked}: this recurrence reads the past only; leave it out.")
        if block_size is not None and (type(block_size) is not int or block_size < 1):
            raise ValueError(f"{self.name}: {asked}, wants a number of tokens of at least 1, or None.")
        if block_size is not None and not options["causal"]:
            raise ValueError(f"{self.name}: causal=False is one block for all; leave block_size out, or causal.")
        if options["form"] == "scan":
            raise ValueError(f"{self.name}: {asked} has no token scan; leave form out.")

    def _scale_doc(self) -> str:
        if not self.scaled:
            return "None; this recurrence has none."
        default = "K**-0.5" if self.default_scale is None else f"{self.default_scale:g}"
        return f"multiplies the queries; None is {default}."

    def _scale(self, caller: str, scale, dims: dict) -> float | None:
        if not self.scaled:
            if scale is not None:
                raise ValueError(f"{caller}: scale={scale!r}: this recurrence has no scale; leave it out.")
            return None
        if scale is None:
            return dims["K"] ** -0.5 if self.default_scale is None else self.default_scale
        if isinstance(scale, (int, float)):
            return float(scale)
        raise ValueError(f"{caller}: scale is {type(scale).__name__}, wants a Python number; multiply q by it instead.")

    def _check_state(self, caller: str, name: str, state: State | None, xs: dict) -> None:
        if state is not None:
            wanted = jax.eval_shape(lambda xs: _zero_state(self, self.fields(xs)), xs)
            checks.state(caller, name, state, wanted)


def resets(segment_ids) -> jax.Array | None:
    """True where a token's document differs from the token's before it; never at the first token."""
    if segment_ids is None:
        return None
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def _positions(seen: jax.Array | int, reset: jax.Array | None, batch: int, length: int) -> jax.Array:
    """`[B, T]` int32: how many tokens of its document came before each token, `seen` of them before the first."""
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    before = jnp.broadcast_to(jnp.asarray(seen, jnp.int32), (batch,))[:, None] + places
    if reset is None:
        return before
    start = lax.cummax(jnp.where(reset, places, -1), axis=1)  # of the token's document, -1 in the first
    return jnp.where(start < 0, before, places - start)


def _zero_state(operator: Operator, fields: dict) -> State:
    return Layout(operator.recurrence, fields).zero_state(fields)


def prepared(operator: Operator, xs: dict, reset, state, **place):
    """`(fields, reset, state)` of the record; `place` goes to `Operator.fields`."""
    fields = operator.fields(xs, reset, state, **place)
    if state is None:
        state = _zero_state(operator, fields)
    else:
        state = jax.tree.map(lambda s: jnp.asarray(s, compute_dtype(fields)), state)
    if reset is not None:
        length = Layout(operator.recurrence, fields).length
        if length != reset.shape[1]:  # micro-steps: a document starts at the first of its token's
            steps = length // reset.shape[1]
            reset = jnp.pad(reset[:, :, None], ((0, 0), (0, 0), (0, steps - 1))).reshape(reset.shape[0], length)
    return fields, reset, state


def finished(operator: Operator, xs: dict, result) -> tuple[jax.Array, State]:
    final, o = result
    return (o if operator.finish is None else operator.finish(o, xs)), final


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan(operator: Operator, scale, xs, segment_ids, state):
    fields, reset, state = prepared(operator, xs, resets(segment_ids), state)
    return finished(operator, xs, forms.scan(operator.recurrence, scale, fields, reset, state))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(operator: Operator, implementation: str, scale, xs, state):
    """One token, with its T axis of 1."""
    if implementation == "xla":
        return _scan(operator, scale, xs, None, state)
    record, (fields, _, state) = operator.recurrence, prepared(operator, xs, None, state)
    run = dispatch.kernel(record, implementation, "STEPS")
    if Layout(record, fields).length > 1:
        raise NotImplementedError(f"{implementation}: its kernel takes one step a token, not several")
    token = {name: x[:, 0] if name in record.fields else x for name, x in fields.items()}
    final, o = run(scale, token, state)
    return finished(operator, xs, (final, o[:, None].astype(fields[record.output_field].dtype)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _chunk(operator: Operator, implementation: str, scale, chunk_size: int | None, xs, segment_ids, state):
    fields, reset, state = prepared(operator, xs, resets(segment_ids), state)
    if implementation == "xla":
        run: Callable = functools.partial(forms.chunk, operator.recurrence)
    else:
        run = dispatch.kernel(operator.recurrence, implementation)
    return finished(operator, xs, run(scale, chunk_size, fields, reset, state))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _bidirectional(
    operator: Operator, implementation: str, scale, chunk_size: int, block_size: int | None, xs, segment_ids, state
):
    if implementation != "xla":
        raise NotImplementedError(f"{implementation}: no kernel that reads the future yet")
    assert operator.bidirectional is not None  # the caller refuses otherwise
    fields, reset, state = prepared(operator, xs, resets(segment_ids), state)
    blocks = None
    if block_size is not None:
        batch, length = next(iter(xs.values())).shape[:2]
        blocks = _positions(0, reset, batch, length) % block_size == 0
    return finished(operator, xs, operator.bidirectional(scale, chunk_size, fields, reset, state, blocks))
