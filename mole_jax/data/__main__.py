"""`python -m mole_jax.data check|show|convert|pack`: the desk for a mixture. Exit status 2 where training would stop at
a record or leave one out."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

from mole_jax import cli
from mole_jax.config import Config
from mole_jax.data import left_out
from mole_jax.data.desk import check, convert, pack, page, show
from mole_jax.data.desk.opened import opened
from mole_jax.data.mixture import shard_count
from mole_jax.errors import UserError, nearest, run_door
from mole_jax.files import write_json, write_text
from mole_jax.terminal import block, escaped, warning

COMMANDS = ("check", "show", "convert", "pack")
OVERVIEW = (
    "Commands: check (also without a command), show, convert, pack; `python -m mole_jax.data COMMAND --help` tells of "
    "each. check: "
)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command and its line, and does it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv and not argv[0].startswith("-") else ""
    if command and command not in COMMANDS:
        raise UserError(
            f"unknown command '{command}', expected one of {', '.join(COMMANDS)}{nearest(command, COMMANDS)}"
        )
    rest = argv[1:] if command else argv
    {"": _check, "check": _check, "show": _show, "convert": _convert, "pack": _pack}[command](command, rest)


def _parse(command: str, argv: list[str], description: str, flags: cli.Flags) -> tuple[Config, argparse.Namespace]:
    return cli.parse(f"data {command}".strip(), description, argv, flags)


def _check(command: str, argv: list[str]) -> None:
    about = (
        "Reads every record of the mixture, counts, lists every problem, and says what an epoch draws and what weighs "
        "in the loss. Exit status 2 where training would stop or leave a record out."
    )
    config, arguments = _parse(command, argv, about if command else OVERVIEW + about, _check_flags)
    loader = opened(config)
    for number, source in enumerate(loader.sources):
        if source.remark:
            print(escaped(source.remark if number < len(config.data.domains) else f"task {source.remark}"))
    for text in show.preview(config.data, loader, arguments.preview, seed=config.seed):
        print(block(text), end="\n\n")
    inspection = check.inspect(config.data, loader, seed=config.seed, workers=arguments.workers)
    for line, notable in inspection.lines():
        print(warning(escaped(line), sys.stdout) if notable else escaped(line))
    if arguments.json:
        write_json(arguments.json, inspection.as_json())
    left_out.check((domain.left_out for domain in inspection.domains), config.data.most_skipped)
    if inspection.stops or inspection.loses:
        sys.exit(2)


def _check_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=_count, default=0, metavar="N", help="processes that read; 0: this one")
    parser.add_argument("--json", metavar="FILE", help="also write all that was found, every problem too")
    parser.add_argument(
        "--preview", type=_count, default=0, metavar="N", help="also show N examples, supervised text between ⟦ and ⟧"
    )


def _show(command: str, argv: list[str]) -> None:
    config, arguments = _parse(
        command,
        argv,
        "Shows the examples that training would draw first, as the model sees them, supervised text between ⟦ and ⟧; "
        "also those that are left out, and why.",
        _show_flags,
    )
    loader = opened(config)
    drawn = show.drawn(config.data, loader, seed=config.seed, domain=arguments.domain)
    shown = itertools.islice(drawn, arguments.examples)
    if arguments.html:
        write_text(arguments.html, page.write_page(config.name, shown, loader))
        print(f"page: {arguments.html}")
        return
    for one in shown:
        print(block(show.told(one, loader)), end="\n\n")


def _show_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--examples", type=_count, default=5, metavar="N", help="how many (default: 5)")
    parser.add_argument("--domain", metavar="NAME", help="of this domain alone")
    parser.add_argument("--html", metavar="FILE", help="write a page with the pictures, one file, and print none")


def _convert(command: str, argv: list[str]) -> None:
    config, arguments = _parse(
        command,
        argv,
        "Writes each domain as ArrayRecord shards with the files of its pictures inside, and prints the lines of a "
        "config that read them. The batches stay the same.",
        _convert_flags,
    )
    found = convert.convert(config.data, opened(config), arguments.output, shards=arguments.shards)
    for line, notable in left_out.lines(found, begin="converted"):
        print(warning(escaped(line), sys.stderr) if notable else escaped(line), file=sys.stderr)
    print("\n".join(convert.config_lines(config.data, arguments.output)))
    if any(one.reasons for one in found):
        sys.exit(2)


def _convert_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="FOLDER", help="gets a folder for each domain")
    parser.add_argument("--shards", type=_at_least_1, default=16, metavar="N", help="files of a domain (default: 16)")


def _pack(command: str, argv: list[str]) -> None:
    config, arguments = _parse(
        command,
        argv,
        "Packs a sample of the mixture under the settings of the config and some beside them, and says how full the "
        "rows are.",
        _pack_flags,
    )
    data, shards = config.data, shard_count(config.data, config.train.batch_rows)
    found = pack.sizes(data, opened(config), arguments.examples, seed=config.seed)
    packed = [pack.pack(one, found, shards=shards) for one in pack.variants(data)]
    print(pack.told(packed))
    print(pack.verdict(packed))


def _pack_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--examples", type=_at_least_1, default=2000, metavar="N", help="examples of the sample (default: 2000)"
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number from 0, got '{text}'")
    return int(text)


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number over 0, got '{text}'")
    return int(text)


if __name__ == "__main__":
    run_door(main)
