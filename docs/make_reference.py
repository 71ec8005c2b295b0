"""Write docs/reference.md from the docstrings of the public names: python docs/make_reference.py"""

from __future__ import annotations

import inspect
import pathlib
import re

import trainable_nn as tnn

PAGE = pathlib.Path(__file__).with_name("reference.md")
HEAD = """# Reference

Written from the docstrings by `python docs/make_reference.py`. Shapes, units, cost, errors and the source in the papers
stand with each name.
"""
ROOMS = {
    "Layers, conversion, certificates, files": ("trainable_nn", tnn),
    "Functions": ("trainable_nn.functional", tnn.functional),
    "Parametrizations": ("trainable_nn.parametrizations", tnn.parametrizations),
    "Linear maps and spectra": ("trainable_nn.linop", tnn.linop),
    "Step sizes": ("trainable_nn.optim", tnn.optim),
    "Constants and calculus": ("trainable_nn.theory", tnn.theory),
    "Paper B": ("trainable_nn.theory.linear_width", tnn.theory.linear_width),
    "Recipes": ("trainable_nn.convert", tnn.convert),
    "Errors": ("trainable_nn.errors", tnn.errors),
}


def public_names(room) -> list[str]:
    """The names that a room offers: its ``__all__``, or the classes and functions that it defines."""
    listed = getattr(room, "__all__", None)
    if listed is None:
        listed = [n for n, v in vars(room).items() if not n.startswith("_") and getattr(v, "__module__", "") == room.__name__]
    kept = [name for name in listed if inspect.isclass(getattr(room, name)) or inspect.isfunction(getattr(room, name))]
    return sorted(kept, key=str.lower)


def signature(value) -> str:
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError):
        return ""
    text = re.sub(r"<function (\w+)[^>]*>|<class '([\w.]+)'>", lambda m: m.group(1) or m.group(2), text)
    return re.sub(r" at 0x[0-9a-f]+", "", text.replace("'", ""))


def entry(prefix: str, name: str, value) -> str:
    """One heading, the signature, the docstring as it stands, and the public methods of a class of ours."""
    lines = [f"### `{name}`", ""]
    shown = signature(value)
    if shown and len(shown) < 900 and not issubclass_of_error(value):
        lines += ["```text", f"{prefix}.{name}{shown}", "```", ""]
    lines += [paragraph(inspect.getdoc(value)), ""]
    if inspect.isclass(value) and not issubclass_of_error(value):
        for method, function in vars(value).items():
            plain = function.fget if isinstance(function, property) else getattr(function, "__func__", function)
            if not method.startswith("_") and inspect.isfunction(plain) and inspect.getdoc(plain) and method != "forward":
                first = inspect.getdoc(plain).split("\n\n")[0].replace("\n", " ")
                lines.append(f"- `{method}{'' if isinstance(function, property) else signature(plain)}`: {first}")
        lines.append("")
    return "\n".join(lines)


def issubclass_of_error(value) -> bool:
    return inspect.isclass(value) and issubclass(value, BaseException)


def paragraph(text: str | None) -> str:
    """A docstring as a fenced text, so that its indentation and its formulas stay as written."""
    return f"```text\n{text}\n```" if text else ""


def reference() -> str:
    parts, seen = [HEAD], set()
    for title, (prefix, room) in ROOMS.items():
        names = [name for name in public_names(room) if id(getattr(room, name)) not in seen]
        parts.append(f"## {title}: `{prefix}`\n")
        for name in names:
            seen.add(id(getattr(room, name)))
            parts.append(entry(prefix, name, getattr(room, name)))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference())
    print(f"Written: {PAGE}")
