"""`python -m mole_jax.data`: inspects a mixture. Exit status 2 where training would stop at a record."""

from __future__ import annotations

import argparse
import sys

from mole_jax import cli
from mole_jax.data import check, left_out
from mole_jax.data.load import RecordSource, check_room
from mole_jax.data.mixture import shard_count
from mole_jax.errors import run_door
from mole_jax.terminal import block, escaped, warning
from mole_jax.tokenizer import Tokenizer
from mole_jax.weights.open import check_vocabulary, open_base, tokenizer_path


def main() -> None:
    """Reads the command line, previews and validates the mixture, and prints."""
    config, arguments = cli.parse(
        "data",
        "Reads every record of the mixture, counts, and lists every problem.",
        extra=_add_flags,
    )
    base = open_base(config.model, config.seed)
    image = base.architecture.image
    tokenizer = Tokenizer.load(tokenizer_path(config.model, base))
    # What training would refuse before it reads a record is told here too.
    check_vocabulary(tokenizer, base.architecture.decoder.vocab)
    check_room(config.data, image, positions=base.architecture.decoder.max_position)
    shard_count(config.data, config.train.batch_rows)
    tasks = [RecordSource.open(task) for task in config.evaluation.tasks]
    loader = check.open_loader(
        config.data,
        tokenizer,
        image,
    )
    for source in (*loader.sources, *tasks):
        if source.remark:
            print(escaped(source.remark))
    for text in check.preview(config.data, loader, arguments.preview, seed=config.seed):
        print(block(text), end="\n\n")
    inspection = check.inspect(config.data, loader)
    for line, notable in inspection.lines():
        print(warning(escaped(line), sys.stdout) if notable else escaped(line))
    left_out.check((domain.left_out for domain in inspection.domains), config.data.most_skipped)
    if inspection.stops:
        sys.exit(2)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preview", type=int, default=0, metavar="N", help="also show N examples, supervised text between ⟦ and ⟧"
    )


if __name__ == "__main__":
    run_door(main)
