"""From a command line to a checked `Config`: the config file, typed overrides, and ``--help``.

Every door (``python -m mole_jax.NAME``) that takes a config parses with `parse`; `generate`, which takes none, parses
with `parse_settings`. tyro reads the values and writes the help. The messages are ours: a mistake is answered in one
line that names the nearest right thing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
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

from mole_jax import config as config_module
from mole_jax import recipes
from mole_jax.compat import none_required, option_strings
from mole_jax.config import Config, DataConfig, DomainConfig, EvaluationConfig, TaskConfig
from mole_jax.config_check import check
from mole_jax.config_json import EARLIER_NAMES, EARLIER_VALUES, describe, from_json, to_json, typed
from mole_jax.errors import UserError, nearest, program

# What --help shows without a config file: one domain and one task, so that their fields are in it too.
_SAMPLE = Config(
    data=DataConfig(domains=(DomainConfig(name="NAME", path="PATH"),)),
    evaluation=EvaluationConfig(tasks=(TaskConfig(name="NAME", path="PATH"),)),
)

Flags = Callable[[argparse.ArgumentParser], None]
"""Adds a door's own flags to its parser."""


def parse(
    door: str, description: str, argv: Sequence[str] | None = None, extra: Flags | None = None
) -> tuple[Config, argparse.Namespace]:
    """Parses the command line of a door that takes a config.

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
    parser = _parser(door, description)
    parser.usage = "%(prog)s --config FILE [--SECTION.FIELD VALUE ...] [options]"
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="Python file with get_config() -> mole_jax.config.Config, YAML or JSON, or the name of a shipped recipe",
    )
    parser.add_argument("--print-config", action="store_true", help="print the settings that result as YAML, and exit")
    if extra is not None:
        extra(parser)
    if _wants_help(argv):
        # Required flags of the door may be absent, so its parser is not run; the file is, to show its values.
        where = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        where.add_argument("--config")
        path = where.parse_known_args(argv)[0].config
        source = f"defaults as {path} sets them" if path else "defaults are those of mole_jax.config"
        _help(parser, Options(_execute(path) if path else _SAMPLE), f"settings, by section ({source})")
    if "--print-config" in argv:
        none_required(parser)  # such as a workdir, of which the settings say nothing
    arguments, overrides = _known(parser, Options(_SAMPLE), argv)
    if arguments.config is None:
        raise UserError("--config FILE is required (try --help)")
    config = load_config(arguments.config, overrides, other_flags=option_strings(parser))
    if arguments.print_config:
        print(as_yaml(config), end="")
        sys.exit(0)
    return config, arguments


def parse_settings[T](
    door: str, description: str, settings: T, extra: Flags, argv: Sequence[str] | None = None
) -> tuple[T, argparse.Namespace]:
    """Parses the command line of a door that takes no config file, but some dataclass of settings as flags.

    Args:
        door, description, argv: as in `parse`.
        settings: a dataclass with the defaults. Each field is a flag, told in ``--help`` by its docstring; a tuple's
            flag is repeated, one value each.
        extra: adds the door's own flags.

    Returns:
        The settings, of the right types but not checked, and the door's own flags.

    Raises:
        UserError: any mistake in the arguments.
        SystemExit: after ``--help``, with status 0.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(door, description)
    extra(parser)
    options = Options(settings, joint="-", repeated=True)
    if _wants_help(argv):
        _help(parser, options, "settings")
    arguments, rest = _known(parser, options, argv)
    return options.overridden(rest, option_strings(parser)), arguments


def _parser(door: str, description: str) -> Parser:
    parser = Parser(prog=program(door), description=description, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    return parser


def _wants_help(argv: Sequence[str]) -> bool:
    return bool({"-h", "--help"} & set(argv))


def _help(parser: Parser, options: Options, title: str) -> NoReturn:
    print(parser.format_help())
    print(f"{title}:\n\n{options.help()}")
    sys.exit(0)


def _known(parser: Parser, options: Options, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the parser's flags, and the arguments that are left for `options`."""
    own = option_strings(parser)
    for token in argv:
        # Before argparse looks, which would call a required flag missing when it is only misspelt.
        name = token.partition("=")[0]
        if name.startswith("--") and "." not in name and name not in own and options.spelt(name) not in options.fields:
            raise UserError(f"unknown option '{name}'{nearest(name, [*own, *options.fields])}")
    return parser.parse_known_args(argv)


def load_config(path: str, overrides: Sequence[str] = (), *, other_flags: Sequence[str] = ()) -> Config:
    """Returns the config of a file with command-line overrides, its types and values checked.

    Args:
        path: Python file that defines ``get_config() -> Config``, YAML or JSON file, or name of a shipped recipe. In
            YAML and JSON the key ``base`` names one of those, from which settings that the file lacks are taken.
        overrides: such as ``["--optimizer.learning_rate", "1e-4", "--data.domains.0.weight=2"]``.
        other_flags: flags of the door, to be named too when one is misspelt.

    Raises:
        UserError: the file is missing or fails, a field is unknown, or a value has the wrong type or makes no sense.
    """
    return check(Options(_execute(path)).overridden(overrides, other_flags))


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
    except SystemExit as error:
        raise UserError(f"{path}{_line(error, path)}: ends the program (SystemExit); it should only return") from None
    except Exception as error:
        raise UserError(f"{path}{_line(error, path)}: {_reason(error)}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path}: {function}() returns {value!r:.80}, expected a {expected}")
    return value


def _execute(path: str) -> Config:
    path = recipes.path(path)
    if Path(path).suffix in WRITTEN:
        return _read(path)
    config = execute(path, "get_config", Config)
    try:
        return typed(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


WRITTEN = (".yaml", ".yml", ".json")
"""Suffixes of configs that are written down and not computed."""


def as_yaml(config: Config) -> str:
    """Returns a config as `load_config` reads it from YAML."""
    import yaml  # as tyro: most starts do without it

    return yaml.safe_dump(to_json(config), sort_keys=False, allow_unicode=True)


def _read(path: str, readers: tuple[str, ...] = ()) -> Config:
    """Returns the config of a YAML or JSON file; `readers` are the files whose ``base`` led to it."""
    import yaml

    if path in readers:
        raise UserError(f"{path}: is its own base ({' -> '.join((*readers, path))}); name another")
    try:
        value = yaml.load(Path(path).read_text("utf-8"), _loader())  # JSON is YAML
    except FileNotFoundError:
        raise UserError(f"--config: no such file '{path}'") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8; save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: no YAML ({getattr(error, 'problem', None) or type(error).__name__})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected sections such as model, data and train, found {type(value).__name__}")
    given = dict(value)
    if (base := given.pop("base", None)) is None:
        return from_json(given, where=path)
    if not isinstance(base, str):
        raise UserError(f"{path}: base is {base!r:.80}, expected a recipe's name or a file")
    beside = Path(path).parent / base
    base = str(beside) if beside.is_file() else recipes.path(base)
    config = _read(base, (*readers, path)) if Path(base).suffix in WRITTEN else _execute(base)
    return from_json(_merged(to_json(config), given), where=path)


@functools.cache
def _loader() -> type:
    """Returns YAML's safe loader with numbers as Python and JSON write them: 2e-5 is text in YAML 1.1."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))
    return Loader


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Returns sections with the fields of `over` put over them; lists are replaced whole."""
    both = {name: (under[name], value) for name, value in over.items() if name in under}
    return {
        **under,
        **over,
        **{name: _merged(*pair) for name, pair in both.items() if all(isinstance(one, dict) for one in pair)},
    }


def _line(error: BaseException, path: str) -> str:
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


class Options[T]:
    """A dataclass's fields, and those of dataclasses in it, as options that tyro reads and describes."""

    def __init__(self, value: T, *, joint: str = "_", repeated: bool = False):
        """Takes the names and defaults of `value`.

        Args:
            joint: what stands between the words of a name.
            repeated: a tuple's option is given once for each element. Off: once, with all of them.
        """
        self.value, self.joint, self.repeated = value, joint, repeated
        self.fields = {self.spelt(flag): annotation for flag, annotation in _fields(value).items()}
        """Annotation of every option, by its flag."""

    def spelt(self, flag: str) -> str:
        """Returns a flag as the fields are named: its words may be joined either way, and it may be an earlier name."""
        name = flag.removeprefix("--").replace("-", self.joint).replace("_", self.joint)
        return "--" + EARLIER_NAMES.get(name, name)

    def overridden(self, tokens: Sequence[str], others: Sequence[str] = ()) -> T:
        """Returns the value with options applied; `others` are flags to be named too when one is misspelt.

        Raises:
            UserError: an option is unknown or given twice, or its value is of the wrong type.
        """
        value = self.value
        for flag, given in self._grouped(tokens, others).items():
            expected = self.fields[flag]
            if self._repeats(flag):  # with "=", or a value that begins with a dash would be taken for an option
                arguments = [f"{flag}={values[0]}" if len(values) == 1 else flag for values in given]
                expected = typing.get_args(expected)[0]
            else:
                arguments = [flag, *given[0]]
            try:
                value = self._tyro(value, arguments)
            except ValueError:
                words = " ".join(word for values in given for word in values)
                kinds = [
                    one for one in (expected, *typing.get_args(expected)) if typing.get_origin(one) is typing.Literal
                ]
                choices = [str(choice) for one in kinds for choice in typing.get_args(one)]
                got = f"got '{words}'" if any(given) else "got nothing"
                raise UserError(f"{flag} expects {describe(expected)}, {got}{nearest(words, choices)}") from None
        return value

    def help(self) -> str:
        """Returns what tyro says of every option: its type, its field's docstring, its default."""
        # On a wide terminal tyro sets columns side by side, which cannot be searched; the process ends after the help.
        os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, 120))
        # tyro draws with what the output's encoding has, so it is shown the real one.
        printed = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding)
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            self._cli(self.value, ["--help"])
        printed.seek(0)
        lines = printed.read().splitlines()
        # tyro's own usage and summary end where its first box begins; ours stand above.
        return "\n".join(lines[next(number for number, line in enumerate(lines) if " options " in line) :])

    def _grouped(self, tokens: Sequence[str], others: Sequence[str]) -> dict[str, list[list[str]]]:
        """Returns each option's values, a list for each time that it is given."""
        found: dict[str, list[list[str]]] = {}
        flag = ""
        for token in tokens:
            if token.startswith("--") and token != "--":
                name, equals, value = token.partition("=")
                flag = self.spelt(name)
                if flag not in self.fields:
                    raise UserError(f"unknown option '{name}'{nearest(flag, [*self.fields, *others])}")
                if flag in found and not self._repeats(flag):
                    raise UserError(f"{flag} is given twice")
                found.setdefault(flag, []).append([self._today(flag, value)] if equals else [])
            elif not flag:
                raise UserError(f"unexpected argument '{token}', settings are given as --section.field value")
            else:
                found[flag][-1].append(self._today(flag, token))
        return found

    @staticmethod
    def _today(flag: str, value: str) -> str:
        """Returns what a value that earlier versions had is called today."""
        return EARLIER_VALUES.get(flag.removeprefix("--"), {}).get(value, value)

    def _repeats(self, flag: str) -> bool:
        return self.repeated and typing.get_origin(self.fields[flag]) is tuple

    def _tyro(self, value: T, arguments: list[str]) -> T:
        """Applies one option. ValueError: tyro refuses it (its boxed message is dropped, the caller knows better)."""
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                return self._cli(value, arguments)
        except SystemExit:
            raise ValueError(arguments) from None

    def _cli(self, value: T, arguments: list[str]) -> T:
        import tyro  # a fifth of a second, and most starts override nothing

        config = (tyro.conf.FlagConversionOff, *((tyro.conf.UseAppendAction,) if self.repeated else ()))
        return tyro.cli(type(value), default=value, args=arguments, use_underscores=self.joint == "_", config=config)


def _fields(value: Any, prefix: str = "--") -> dict[str, Any]:
    """Annotation of every field by its dotted name; elements of tuples of dataclasses are named by their number."""
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
