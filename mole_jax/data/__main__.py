"""`python -m mole_jax.data`: inspects a mixture. Exit status 2 where training would stop at a record."""

from __future__ import annotations

import argparse
import sys

from mole_jax import cli
from mole_jax.data import check
from mole_jax.errors import run_door
from mole_jax.tokenizer import Tokenizer
from mole_jax.weights.open import open_base, tokenizer_path


def main() -> None:
    """Reads the command line, previews and validates the mixture, and prints."""
    config, arguments = cli.parse(
        "data",
        "Reads every record of the mixture, counts, and lists every problem.",
        extra=_add_flags,
    )
    source = open_base(config.model, config.seed)
    loader = check.open_loader(
        config.data,
        Tokenizer.load(tokenizer_path(config.model, source)),
        source.architecture.image,
    )
    for text in check.preview(config.data, loader, arguments.preview, seed=config.seed):
        print(text, end="\n\n")
    inspection = check.inspect(config.data, loader)
    print(inspection)
    if inspection.stops:
        sys.exit(2)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preview", type=int, default=0, metavar="N", help="also show N examples, supervised text between ⟦ and ⟧"
    )


if __name__ == "__main__":
    run_door(main)
