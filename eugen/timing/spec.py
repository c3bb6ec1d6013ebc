"""Names with options as on a command line: `eugen(order=2)`, `package.module:factory(width=64)`."""

from __future__ import annotations

import ast
from typing import Any


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """The name and its options; a bare word as a value is a string.

    Raises:
        ValueError: options that are no `name=value` with plain values.
    """
    name, bracket, rest = text.partition("(")
    if not bracket:
        return text, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError(rest)
        if any(word.arg is None for word in call.keywords):
            raise ValueError(rest)
        return name, {str(word.arg): _value(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} must be a name, or name(option=value, …) with plain values") from error


def split(text: str) -> list[str]:
    """The parts between commas that stand outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
