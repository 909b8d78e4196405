"""The signature and the docstring of an operator, which `help`, `inspect.signature` and notebooks show."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .operator import Operator

OPTIONS: dict[str, Any] = dict(
    scale=None,
    initial_state=None,
    segment_ids=None,
    form="chunk",
    chunk_size=None,
    implementation=None,
    axis_name=None,
    strategy=None,
)
_DOC = """

Call: `o, final_state = {name}({arguments}, *, scale=None, initial_state=None, segment_ids=None, form="chunk",
chunk_size=None, implementation=None, axis_name=None, strategy=None{directions})`; one token without its T axis:
`o_t, state = {name}.step({arguments}, *, state, scale=None, implementation=None)`.

Args:
{shapes}
    scale: {scale}
    initial_state: {state}, float32; None is the state that has seen nothing, zeros unless said above.
    segment_ids: int [B, T]; the state is reset where the id changes, the initial state enters only the first segment
        and the final state is the last segment's. What is not finite in one segment stays in it.
    form: "chunk" (chunk-parallel, for training and prefill) or "scan" (token by token, the reference). Reverse-mode
        derivatives work for both; forward-mode ones (`jax.jvp`, `jacfwd`, `hessian`) and a symbolic T in `jax.export`
        need form="scan".
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
_CAUSAL = """
    causal: False: every token reads its whole document, the future as the recurrence run backwards in time reads it."""
_BLOCK = """
    block_size: every token reads its whole block of so many tokens, counted from the document's start, and earlier
        blocks as a causal one does; a state belongs between two blocks. None: blocks of one token."""


def directions(operator: "Operator") -> dict[str, Any]:
    """The options by which an operator's tokens may read the future, with their defaults."""
    return ({"causal": True} if operator.bidirectional else {}) | (
        {"block_size": None} if operator.takes_blocks else {}
    )


def signature(operator: "Operator") -> inspect.Signature:
    """The signature of a call. An optional argument that others follow has no default; it is given as None."""
    names = list(operator.arguments)
    required = max(i for i, name in enumerate(names) if not operator.arguments[name].optional)
    positional, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    parameters = [
        inspect.Parameter(name, positional, default=None if i > required else empty) for i, name in enumerate(names)
    ]
    for option, default in {**OPTIONS, **directions(operator)}.items():
        parameters.append(inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default))
    return inspect.Signature(parameters)


def named_step(operator: "Operator", run: Callable) -> Callable:
    """`run` as a function whose signature names the arguments of one token."""

    def step(*args, **kwargs):
        return run(*args, **kwargs)

    call = signature(operator).parameters.values()
    arguments = [p for p in call if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    for option in ("state", "scale", "implementation"):
        arguments.append(inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=None))
    step.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]
    step.__doc__ = type(operator).step.__doc__
    return step


def docstring(operator: "Operator") -> str:
    return operator.about + _DOC.format(
        name=operator.name,
        arguments=", ".join(operator.arguments),
        shapes="\n".join(
            f"    {name}: float [{', '.join(argument.letters)}]{', or None' if argument.optional else ''}"
            for name, argument in operator.arguments.items()
        ),
        scale=_scale(operator),
        state=operator.state,
        output=operator.recurrence.fields[operator.recurrence.output_field].replace(" ", ", "),
        output_field=operator.output_argument,
        directions="".join(f", {name}={value}" for name, value in directions(operator).items()),
        directions_doc=(_CAUSAL if operator.bidirectional else "") + (_BLOCK if operator.takes_blocks else ""),
    )


def _scale(operator: "Operator") -> str:
    if not operator.scaled:
        return "None; this recurrence has none."
    default = "K**-0.5" if operator.default_scale is None else f"{operator.default_scale:g}"
    return f"multiplies the queries; None is {default}."
