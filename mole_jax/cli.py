"""From a command line to a checked `Config`: the config file, typed overrides, and ``--help``.

Every door (``python -m mole_jax.NAME``) that takes a config parses with `parse`. tyro reads the overrides' values and
writes the help; the messages are ours, because a mistake is answered in one line that names the nearest right thing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import re
import runpy
import shutil
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro

from mole_jax import config as config_module
from mole_jax.config import Config, DataConfig, DomainConfig, EvaluationConfig, TaskConfig
from mole_jax.config_check import check
from mole_jax.config_json import describe, typed
from mole_jax.errors import UserError, nearest

# What --help shows without a config file: one domain and one task, so that their fields are in it too.
_SAMPLE = Config(
    data=DataConfig(domains=(DomainConfig(name="NAME", path="PATH"),)),
    evaluation=EvaluationConfig(tasks=(TaskConfig(name="NAME", path="PATH"),)),
)


def parse(
    door: str,
    description: str,
    argv: Sequence[str] | None = None,
    extra: Callable[[argparse.ArgumentParser], None] | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Parses the command line of a door.

    Args:
        door: the command's name, as in ``python -m mole_jax.DOOR``.
        description: what it does, for ``--help``.
        argv: arguments. None: those of the process.
        extra: adds the door's own flags.

    Returns:
        The checked config of ``--config`` with its overrides, and the door's own flags.

    Raises:
        UserError: any mistake in the file or the arguments.
        SystemExit: after ``--help``, with status 0.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog=f"python -m mole_jax.{door}", description=description, add_help=False, allow_abbrev=False)
    parser.usage = "%(prog)s --config FILE [--SECTION.FIELD VALUE ...] [options]"
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    parser.add_argument("--config", metavar="FILE", help="Python file with get_config() -> mole_jax.config.Config")
    if extra is not None:
        extra(parser)
    if {"-h", "--help"} & set(argv):
        # Required flags of the door may be absent, so its parser is not run; the file is, to show its values.
        where = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        where.add_argument("--config")
        path = where.parse_known_args(argv)[0].config
        print(parser.format_help())
        print(_settings_help(_execute(path) if path else _SAMPLE, path))
        sys.exit(0)
    own = [flag for action in parser._actions for flag in action.option_strings]
    for token in argv:
        # Before argparse looks, which would call a required flag missing when it is only misspelt.
        flag = token.partition("=")[0]
        if flag.startswith("--") and "." not in flag and flag not in (*own, "--name", "--seed"):
            raise UserError(f"unknown option '{flag}'{nearest(flag, [*own, *_fields(_SAMPLE)])}")
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.config is None:
        raise UserError("--config FILE is required (try --help)")
    return load_config(arguments.config, overrides, other_flags=own), arguments


def load_config(path: str, overrides: Sequence[str] = (), *, other_flags: Sequence[str] = ()) -> Config:
    """Returns the config of a file with command-line overrides, its types and values checked.

    Args:
        path: Python file that defines ``get_config() -> Config``.
        overrides: such as ``["--optimizer.learning_rate", "1e-4", "--data.domains.0.weight=2"]``.
        other_flags: flags of the door, to be named too when one is misspelt.

    Raises:
        UserError: the file is missing or fails, a field is unknown, or a value has the wrong type or makes no sense.
    """
    config = _execute(path)
    config = _override(config, list(overrides), other_flags)
    return check(config)


class Parser(argparse.ArgumentParser):
    """Raises instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (try --help)")


def execute[T](path: str, function: str, kind: type[T]) -> T:
    """Returns what a function of a Python file returns, which must be a `kind`; raises `UserError` in one line."""
    if not Path(path).is_file():
        raise UserError(f"--config: no such file '{path}'")
    expected = f"{kind.__module__}.{kind.__name__}"
    try:
        get = runpy.run_path(path).get(function)
        if not callable(get):
            raise UserError(f"{path}: defines no function {function}() that returns a {expected}")
        value = get()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}{_line(error, path)}: {_reason(error)}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path}: {function}() returns {value!r:.80}, expected a {expected}")
    return value


def _execute(path: str) -> Config:
    config = execute(path, "get_config", Config)
    try:
        return typed(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _line(error: Exception, path: str) -> str:
    """ ", line N" of the config file's last line in the traceback."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f", line {lines[-1]}" if lines else ""


def _reason(error: Exception) -> str:
    """What went wrong, on one line; an unknown field of a config class gets the nearest right one."""
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    kind = getattr(config_module, found[1], None) if found else None
    if found and dataclasses.is_dataclass(kind):
        return (
            f"{found[1]} has no field '{found[2]}'{nearest(found[2], [one.name for one in dataclasses.fields(kind)])}"
        )
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _fields(value: Any, prefix: str = "--") -> dict[str, Any]:
    """Annotation of every option, by its flag; elements of tuples of dataclasses are named by their number."""
    found = {}
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        inner, flag = getattr(value, field.name), prefix + field.name
        if dataclasses.is_dataclass(inner):
            found |= _fields(inner, flag + ".")
        elif isinstance(inner, tuple) and dataclasses.is_dataclass(typing.get_args(hints[field.name])[0]):
            for number, one in enumerate(inner):
                found |= _fields(one, f"{flag}.{number}.")
        else:
            found[flag] = hints[field.name]
    return found


def _override(config: Config, tokens: list[str], other_flags: Sequence[str]) -> Config:
    fields = _fields(config)
    groups: dict[str, list[str]] = {}
    flag = ""
    for token in tokens:
        if token.startswith("--") and token != "--":
            name, equals, value = token.partition("=")
            flag = name.replace("-", "_").replace("__", "--", 1)
            if flag not in fields:
                raise UserError(f"unknown option '{name}'{nearest(flag, [*fields, *other_flags])}")
            if flag in groups:
                raise UserError(f"{flag} is given twice")
            groups[flag] = [value] if equals else []
        elif not flag:
            raise UserError(f"unexpected argument '{token}', settings are given as --section.field value")
        else:
            groups[flag].append(token)
    for flag, values in groups.items():
        try:
            config = _tyro(config, [flag, *values])
        except ValueError:
            given = " ".join(values)
            choices = typing.get_args(fields[flag]) if typing.get_origin(fields[flag]) is typing.Literal else ()
            got = f"got '{given}'" if values else "got nothing"
            raise UserError(f"{flag} expects {describe(fields[flag])}, {got}{nearest(given, choices)}") from None
    return config


def _tyro(config: Config, arguments: list[str]) -> Config:
    """Applies one option. ValueError: tyro refuses it (its boxed message is dropped, the caller knows better)."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(Config, default=config, args=arguments, **_STYLE)
    except SystemExit:
        raise ValueError(arguments) from None


_STYLE: dict[str, Any] = {"use_underscores": True, "config": (tyro.conf.FlagConversionOff,)}


def _settings_help(config: Config, path: str | None) -> str:
    # On a wide terminal tyro sets columns side by side, which cannot be searched; the process ends after the help.
    os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, 120))
    # tyro draws with what the output's encoding has, so it is shown the real one.
    printed = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding)
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(Config, default=config, args=["--help"], **_STYLE)
    printed.seek(0)
    lines = printed.read().splitlines()
    # tyro's own usage and summary end where its first box begins; ours stand above.
    start = next(number for number, line in enumerate(lines) if " options " in line)
    source = f"defaults as {path} sets them" if path else "defaults are those of mole_jax.config"
    return f"settings, by section ({source}):\n\n" + "\n".join(lines[start:])
