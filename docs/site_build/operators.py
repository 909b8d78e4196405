"""Recurrences as mkdocstrings shows functions: an `Operator` has its signature and docstring only when it exists."""

import importlib
import inspect

import griffe


class Operators(griffe.Extension):
    """Puts the docstring and the parameters of every recurrence where static analysis sees an attribute."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        if pkg.name != "lineax_seq":
            return
        for name, operator in importlib.import_module("lineax_seq").RECURRENCES.items():
            module = pkg["recurrences"][name]
            parameters = griffe.Parameters(
                *(
                    griffe.Parameter(
                        p.name,
                        kind=griffe.ParameterKind[p.kind.name.lower()],
                        default=None if p.default is inspect.Parameter.empty else repr(p.default),
                    )
                    for p in inspect.signature(operator).parameters.values()
                )
            )
            function = griffe.Function(name, parameters=parameters, lineno=module[name].lineno)
            function.docstring = griffe.Docstring(inspect.cleandoc(operator.__doc__), parent=function, parser="google")
            module.set_member(name, function)
