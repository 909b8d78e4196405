"""Writes the stub of the registry, so that editors and type checkers see every recurrence's own arguments.

    python -m tests.typing.stub

Recurrences are declared as data, which a type checker cannot follow; the stub says the same as signatures.
"""

import inspect
import textwrap
from pathlib import Path

import lineax_seq as ls
from lineax_seq.core.dispatch import IMPLEMENTATIONS
from lineax_seq.core.operator import FORMS
from lineax_seq.parallel import prefix

PATH = Path(ls.recurrences.__file__).with_suffix(".pyi")
HEADER = '''"""Generated from the registry by `python -m tests.typing.stub`; a test fails where it is not up to date."""

from collections.abc import Sequence
from typing import Literal

from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from ..core.operator import Operator
from ..core.typing import State
from .lightnet import lightnet_2d as lightnet_2d

'''
TYPES = {
    "scale": "float | None",
    "initial_state": "State | None",
    "state": "State | None",
    "segment_ids": 'Int[ArrayLike, "B T"] | None',
    "form": "_Form",
    "chunk_size": "int | None",
    "implementation": "_Implementation | Sequence[_Implementation] | None",
    "axis_name": "str | None",
    "strategy": "_Strategy | None",
    "causal": "bool",
    "block_size": "int | None",
}
WIDTH = 120 - len('        """')
STEP_OPTIONS = ("state", "scale", "implementation")


def literal(values) -> str:
    return f"Literal[{', '.join(quoted(value) for value in values)}]"


def quoted(value) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def spaced(dims: str) -> str:
    """A single letter with a space before it, as jaxtyping wants it: alone it would be read as a name."""
    return dims if " " in dims else f" {dims}"


def wrapped(doc: str) -> str:
    """The text with its paragraphs filled anew where they are too wide for a method's indentation."""
    paragraphs = [
        textwrap.fill(" ".join(paragraph.split()), WIDTH) if max(map(len, paragraph.split("\n"))) > WIDTH else paragraph
        for paragraph in doc.strip().split("\n\n")
    ]
    text = "\n\n".join(paragraphs)
    return text + "\n" if "\n" in text else text


def method(operator: ls.Operator, name: str, parameters: list[inspect.Parameter], doc: str, token: bool) -> str:
    """One method in full: an argument a line, as a formatter would have it."""
    lines = [f"    def {name}(", "        self,"]
    keyword_only = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("        *,")
        if parameter.name in operator.arguments:
            argument = operator.arguments[parameter.name]
            dims = argument.token().dims if token else argument.dims
            kind = f'Float[ArrayLike, "{spaced(dims)}"]' + (" | None" if argument.optional else "")
        else:
            kind = TYPES[parameter.name]
        default = "" if parameter.default is parameter.empty else f" = {quoted(parameter.default)}"
        lines.append(f"        {parameter.name}: {kind}{default},")
    dims = "B " + ("" if token else "T ") + operator.recurrence.fields[operator.recurrence.output_field]
    lines.append(f'    ) -> tuple[Float[Array, "{dims}"], State]:')
    text = textwrap.indent(f'"""{wrapped(doc)}"""', " " * 8)
    return "\n".join([*lines, *(line.rstrip() for line in text.splitlines())])


def declaration(operator: ls.Operator) -> str:
    parameters = list(inspect.signature(operator).parameters.values())
    step = [parameter for parameter in parameters if parameter.name in operator.arguments]
    step += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in STEP_OPTIONS]
    one_token = f"One token of {operator.name}: arguments without their T axis, the state as a call returns it."
    return "\n".join(
        [
            f"class _{operator.name}(Operator):",
            method(operator, "__call__", parameters, operator.about, token=False),
            "",
            method(operator, "step", step, one_token, token=True),
            "",
            f"{operator.name}: _{operator.name}",
        ]
    )


def stub() -> str:
    aliases = {"_Form": FORMS, "_Implementation": IMPLEMENTATIONS, "_Strategy": prefix.STRATEGIES}
    return "\n".join(
        [
            HEADER + "\n".join(f"{name} = {literal(values)}" for name, values in aliases.items()),
            "\nRECURRENCES: dict[str, Operator]\n",
            "\n\n".join(declaration(operator) for operator in ls.RECURRENCES.values()) + "\n",
        ]
    )


if __name__ == "__main__":
    PATH.write_text(stub(), encoding="utf-8")
