"""The form that a JSON value of a file must have before it is used.

A form is a type (`int`, `float`, `str`, `bool`, `dict`, `list`), None for null, a tuple of forms of which one must fit,
a list of the one form that all entries have, or a dict of the forms of fields by name. The name ``...`` stands for all
other fields; a field whose form allows null may be absent.
"""

from __future__ import annotations

from typing import Any

NUMBER = (float, int)
MAYBE_NUMBER = (float, int, None)


def misfit(value: Any, form: Any, at: str = "") -> str | None:
    """Returns in words what of `value` is not of `form`, or None; `at` is the dotted name of the value."""
    if isinstance(form, tuple):
        found = [misfit(value, one, at) for one in form]
        return None if None in found else found[0]
    if isinstance(form, dict) and isinstance(value, dict):
        return _of_fields(value, form, at)
    if isinstance(form, list) and isinstance(value, list):
        parts = (misfit(one, form[0], _below(at, place)) for place, one in enumerate(value))
        return next((part for part in parts if part), None)
    kind = type(form) if isinstance(form, dict | list) else type(None) if form is None else form
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return None
    return f"{at or 'it'} is {_called(type(value))}, not {_called(kind)}"


def _of_fields(value: dict[str, Any], form: dict[Any, Any], at: str) -> str | None:
    for name, one in form.items():
        if name is ... or (name not in value and misfit(None, one) is None):
            continue
        if name not in value:
            return f"{_below(at, name)} is missing"
    for name, one in value.items():
        wanted = form.get(name, form.get(...))
        if wanted is not None and (found := misfit(one, wanted, _below(at, name))):
            return found
    return None


def _below(at: str, name: object) -> str:
    return f"{at}.{name}" if at else str(name)


def _called(kind: type) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a whole number"}
    return names.get(kind) or ("null" if kind is type(None) else "a number")
