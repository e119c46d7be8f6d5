"""Signatures of functions in source files that cannot be imported here."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

NO_DEFAULT = inspect.Parameter.empty


def positional(path: Path, function: str) -> list[tuple[str, Any]]:
    """Positional parameters of a function in a file, with their literal defaults."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    (found,) = (n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == function)
    names = [argument.arg for argument in found.args.args]
    defaults = [ast.literal_eval(value) for value in found.args.defaults]
    return list(zip(names, [NO_DEFAULT] * (len(names) - len(defaults)) + defaults, strict=True))


def positional_of(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """The same of a function that is at hand."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
