"""Configs, and other frozen dataclasses, to and from plain JSON values; the check of their types."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Union

from mole_jax.config import AdapterConfig, Config
from mole_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_WORDS = {int: "an integer", float: "a number", str: "text", bool: "True or False", type(None): "None"}


def to_json(value: DataclassInstance) -> dict[str, Any]:
    """Returns a config, or any frozen dataclass of such fields, as dicts, lists, numbers and strings."""
    return {field: _plain(one) for field, one in dataclasses.asdict(value).items()}


LATER = ("shared_rank", "route_by", "shared_router", "domain_weight")
"""Fields that `AdapterConfig` once did not have; at their defaults they mean what their absence meant."""


def identity(adapter: AdapterConfig) -> str:
    """Returns the text of `adapter` that hashes are made of: weights keep theirs when a version adds a setting."""
    fields = dataclasses.fields(adapter)
    kept = [field.name for field in fields if field.name not in LATER or getattr(adapter, field.name) != field.default]
    return f"AdapterConfig({', '.join(f'{name}={getattr(adapter, name)!r}' for name in kept)})"


def from_json(values: Mapping[str, Any], *, where: str = "config.json") -> Config:
    """Returns the config of which `to_json` made `values`. A field that is not there takes its default.

    Raises:
        UserError: an unknown field, a wrong type, or a required field missing; `where` is the file it names.
    """
    return dataclass_from_json(values, Config, where=where)


def dataclass_from_json[T](values: Mapping[str, Any], kind: type[T], *, where: str) -> T:
    """As `from_json`, for any dataclass whose fields are of the kinds that a config's are."""
    try:
        return _typed(dict(values), kind, "", plain=True)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def typed(config: Config) -> Config:
    """Returns `config` with every field of its annotated type (whole numbers become floats where those are meant).

    Raises:
        UserError: a field's value is of another type; names the dotted field, what it expects and what it got.
    """
    return _typed(config, Config, "", plain=False)


def describe(annotation: Any) -> str:
    """Returns what a field of this annotation expects, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(one) for one in arguments)
    if origin is tuple:
        return f"a tuple, each {describe(arguments[0])}"
    return _WORDS.get(annotation) or f"a {annotation.__name__}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _typed(value: Any, annotation: Any, field: str, *, plain: bool, expected: str = "") -> Any:
    """Checks and converts one value. `plain`: dataclasses come as dicts and tuples as lists."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):  # all unions here are of one type and None
        if value is None:
            return None
        (inner,) = (one for one in arguments if one is not type(None))
        return _typed(value, inner, field, plain=plain, expected=describe(annotation))
    if dataclasses.is_dataclass(annotation):
        if isinstance(value, dict if plain else typing.cast(type, annotation)):
            return _typed_fields(value, typing.cast(type, annotation), field, plain=plain)
    elif origin is tuple:
        if isinstance(value, list if plain else tuple):
            return tuple(_typed(one, arguments[0], f"{field}.{i}", plain=plain) for i, one in enumerate(value))
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif isinstance(value, bool) and annotation is not bool:
        pass  # bool is a subclass of int, but True is no number of steps
    elif isinstance(value, annotation):
        return value
    elif annotation is float and isinstance(value, int):
        return float(value)
    hint = nearest(value, arguments) if origin is Literal and isinstance(value, str) else ""
    raise UserError(f"{field or 'the configuration'} expects {expected or describe(annotation)}, got {value!r}{hint}")


def _typed_fields(value: Any, kind: type, field: str, *, plain: bool) -> Any:
    hints = typing.get_type_hints(kind)
    names = [one.name for one in dataclasses.fields(kind)]
    prefix = f"{field}." if field else ""
    given = value if plain else {name: getattr(value, name) for name in names}
    for name in given:
        if name not in names:
            full = [prefix + one for one in names]
            raise UserError(f"unknown field '{prefix}{name}'{nearest(prefix + name, full)}")
    for one in dataclasses.fields(kind):
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and one.name not in given:
            raise UserError(f"field '{prefix}{one.name}' is missing")
    return kind(**{name: _typed(one, hints[name], prefix + name, plain=plain) for name, one in given.items()})
