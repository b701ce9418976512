"""``python -m mole_jax.synthetic``: writes the synthetic domains."""

from __future__ import annotations

import argparse

from mole_jax.errors import program, run_door
from mole_jax.files import explained, local
from mole_jax.synthetic.domains import DOMAINS, generate, texts
from mole_jax.synthetic.vocabulary import train_tokenizer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=program("synthetic"),
        description="Make three synthetic domains that conflict, and captions to pretrain a base on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data")
    parser.add_argument("--train", type=int, default=1500, help="training records per domain")
    parser.add_argument("--test", type=int, default=150, help="test records per domain")
    parser.add_argument("--conflict", type=float, default=1.0, help="share of questions worded alike in all domains")
    parser.add_argument(
        "--disagreement",
        type=float,
        metavar="SHARE",
        help="make the study's domains instead: the same pictures and questions, this share of the names different",
    )
    parser.add_argument("--asked", type=float, default=0.0, help="share of captions that answer such a question")
    parser.add_argument("--captions", type=int, default=0, help="caption records for pretraining")
    parser.add_argument("--tokenizer", metavar="DIR", help="also train a tokenizer on the texts and write it here")
    chosen = parser.parse_args(arguments)
    output = local(chosen.output)
    with explained(output):
        manifest = generate(
            output,
            seed=chosen.seed,
            train=chosen.train,
            test=chosen.test,
            conflict=chosen.conflict,
            captions=chosen.captions,
            disagreement=chosen.disagreement,
            asked=chosen.asked,
        )
    print(f"{chosen.output}: {', '.join(DOMAINS)}: {chosen.train} train and {chosen.test} test records each", end="")
    print(f", {chosen.captions} captions, sha256 {manifest['sha256'][:16]}")
    if chosen.tokenizer:
        folder = local(chosen.tokenizer)
        with explained(folder):
            print(f"tokenizer: {train_tokenizer(texts(output), folder)}")


if __name__ == "__main__":
    run_door(main)
