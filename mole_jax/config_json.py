"""Configs, and other frozen dataclasses, to and from plain JSON values; the check of their types."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, Union

from mole_jax.config import Config
from mole_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_WORDS = {int: "an integer", float: "a number", str: "text", bool: "True or False", type(None): "None"}


def to_json(value: DataclassInstance) -> dict[str, Any]:
    """Returns a config, or any frozen dataclass of such fields, as dicts, lists, numbers and strings."""
    return {field: _plain(one) for field, one in dataclasses.asdict(value).items()}


EARLIER_NAMES: Mapping[str, str] = {"data.images_per_row": "data.tiles_per_row"}
"""Settings that earlier versions called otherwise."""
EARLIER_VALUES: Mapping[str, Mapping[str, str]] = {"model.remat": {"dots": "most"}}
"""Values of settings that have gone, and what comes nearest: "most" recomputes about as little as "dots" did."""


ALWAYS: Mapping[str, tuple[str, ...]] = {
    "AdapterConfig": (
        *("kind", "rank", "alpha", "dropout", "targets", "experts", "router_bias", "router_gradient"),
        *("balance_loss", "balance_weight", "expert_path", "expert_sharding"),
    ),
    "VisionArchitecture": ("norm_eps", "activation"),
    "DecoderArchitecture": ("rope_theta", "rope_scaling", "norm_eps", "tied_head", "bos_id", "eos_id", "pad_id"),
    "LlavaArchitecture": ("feature_layer", "feature_select", "image_vectors"),
}
"""Fields with a default that are part of a hash at their default too, by class: those of the first version. Add none:
a field that comes later must change no hash of weights that never heard of it."""
LATER = ("shared_rank", "route_by", "shared_router", "domain_weight")
"""Fields of `AdapterConfig` that came after the first version and before the first hash of an adapter folder."""


def identity(value: DataclassInstance, also: Collection[str] = ()) -> str:
    """Returns the text of an architecture or adapter that hashes are made of.

    It looks like its repr, without the fields that are at their defaults and neither in `ALWAYS` nor in `also`. So a
    new field with a default does not change the hashes of weights from before.
    """
    said = (f"{name}={_identity_of(field)}" for name, field in _identifying(value, also).items())
    return f"{type(value).__name__}({', '.join(said)})"


def identity_json(value: DataclassInstance) -> dict[str, Any]:
    """Returns `to_json` of the fields that `identity` has."""
    return {
        name: identity_json(field) if _is_instance(field) else _plain(field)
        for name, field in _identifying(value).items()
    }


def _identity_of(value: Any) -> str:
    return identity(value) if _is_instance(value) else repr(value)


def _identifying(value: DataclassInstance, also: Collection[str] = ()) -> dict[str, Any]:
    always = {*ALWAYS.get(type(value).__name__, ()), *also}
    found = {}
    for field in dataclasses.fields(value):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        own = getattr(value, field.name)
        if default is dataclasses.MISSING or field.name in always or own != default:
            found[field.name] = own
    return found


def _is_instance(value: Any) -> TypeGuard[DataclassInstance]:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def from_json(values: Mapping[str, Any], *, where: str = "config.json") -> Config:
    """Returns the config of which `to_json` made `values`. A field that is not there takes its default.

    What earlier versions called otherwise (`EARLIER_NAMES`, `EARLIER_VALUES`) is read as what it is called today.

    Raises:
        UserError: an unknown field, a wrong type, or a required field missing; `where` is the file it names.
    """
    for before, now in EARLIER_NAMES.items():
        section, _, field = before.partition(".")
        fields = values.get(section)
        if isinstance(fields, Mapping) and field in fields:
            others = {name: value for name, value in fields.items() if name != field}
            values = {**values, section: {now.partition(".")[2]: fields[field], **others}}
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
    if origin in (Union, types.UnionType):  # of one type and None, or of dataclasses that no two have the same fields
        if value is None and type(None) in arguments:
            return None
        others = [one for one in arguments if one is not type(None)]
        inner = others[0] if len(others) == 1 else _chosen(value, others, field, plain=plain)
        return _typed(value, inner, field, plain=plain, expected=describe(annotation))
    if dataclasses.is_dataclass(annotation):
        if isinstance(value, dict if plain else typing.cast(type, annotation)):
            return _typed_fields(value, typing.cast(type, annotation), field, plain=plain)
    elif origin is tuple:
        if isinstance(value, list if plain else tuple):
            return tuple(_typed(one, arguments[0], f"{field}.{i}", plain=plain) for i, one in enumerate(value))
    elif origin is Literal:
        if isinstance(value, str) and (value := EARLIER_VALUES.get(field, {}).get(value, value)) in arguments:
            return value
    elif isinstance(value, bool) and annotation is not bool:
        pass  # bool is a subclass of int, but True is no number of steps
    elif isinstance(value, annotation):
        return value
    elif annotation is float and isinstance(value, int):
        return float(value)
    hint = nearest(value, arguments) if origin is Literal and isinstance(value, str) else ""
    raise UserError(f"{field or 'the configuration'} expects {expected or describe(annotation)}, got {value!r}{hint}")


def _chosen(value: Any, kinds: Sequence[Any], field: str, *, plain: bool) -> Any:
    """Returns which of several dataclasses a value is of: plain ones are told by the names of their fields."""
    if not plain:
        found = [kind for kind in kinds if isinstance(value, kind)]
    else:
        named = {kind: {one.name for one in dataclasses.fields(kind)} for kind in kinds}
        fits = [kind for kind in kinds if isinstance(value, Mapping) and set(value) <= named[kind]]
        found = sorted(fits, key=lambda kind: len(named[kind]))
    if not found:
        words = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{field or 'the configuration'} expects the fields of {words}, got {value!r}")
    return found[0]


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
