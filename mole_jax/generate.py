"""``python -m mole_jax.generate``: answers about images: one, a file of them, or a chat."""

from __future__ import annotations

import argparse
import sys
import typing

from mole_jax import cli
from mole_jax.config import Dtype, GenerateConfig, ImageAspect, PromptName
from mole_jax.config_check import check_decoding
from mole_jax.errors import UserError, run_door
from mole_jax.files import local
from mole_jax.parallel import compiled
from mole_jax.terminal import escaped


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run's folder, a HF folder, a hub name, adapters or a LLaVA-MoLE file")
    add("--base", help="model that adapters stand on; default: the one that they name")
    add("--alpha", type=float, help="scale times rank of a LLaVA-MoLE file; default: as it says, else twice the rank")
    add("--tokenizer", help="folder with tokenizer.model or tokenizer.json; default: the checkpoint's")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--question", help="a question; <image> stands where the image belongs, else it comes first")
    what.add_argument("--questions", type=local, metavar="FILE", help="JSONL with question_id, text and image")
    what.add_argument("--chat", action="store_true", help="read questions from the terminal, one a line")
    add("--image", action="append", default=[], metavar="FILE", help="an image for --question or --chat; repeatable")
    add("--output", type=local, metavar="FILE", help="answers to --questions, JSONL; what is in it is not asked again")
    add("--image-root", type=local, metavar="DIR", help="folder of the images of --questions; default: that file's")
    add("--on-bad", choices=("error", "skip"), default="error", help="a bad line or image among --questions")
    add("--batch-size", type=int, default=8, help="--questions decoded at a time (default: 8)")
    add("--prompt", choices=typing.get_args(PromptName), help="prompt preset; default: as trained")
    add("--image-aspect", choices=typing.get_args(ImageAspect), help="how images become square; default: as trained")
    compiled.add_flag(parser)
    add("--dtype", choices=typing.get_args(Dtype), help="of weights and activations; default: bfloat16 but on CPU")


def _parse() -> tuple[GenerateConfig, argparse.Namespace]:
    settings, flags = cli.parse_settings(
        "generate",
        "Answer questions about images: one (--question), a file (--questions), or a chat (--chat).",
        GenerateConfig(),
        extra=_flags,
    )
    if (flags.questions is None) != (flags.output is None):
        raise UserError("--questions FILE and --output FILE belong together; give both or neither")
    if flags.questions and flags.image:
        raise UserError("--image belongs to --question and --chat; a file names its images itself")
    if flags.question is not None and not flags.question.strip():
        raise UserError("--question is empty; write a question")
    if flags.batch_size < 1:
        raise UserError(f"--batch-size is {flags.batch_size}, it must be at least 1")
    return settings, flags


def main() -> None:
    settings, flags = _parse()
    decoding = check_decoding(settings.decoding, "decoding")
    import jax

    compiled.keep(flags)
    from mole_jax.api import load
    from mole_jax.serving.assistant import Assistant
    from mole_jax.serving.chat import chat
    from mole_jax.serving.questions import answer_file

    model, processor = load(
        flags.checkpoint,
        base=flags.base,
        alpha=flags.alpha,
        tokenizer=flags.tokenizer,
        dtype=flags.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        prompt=flags.prompt,
        image_aspect=flags.image_aspect,
        mesh=settings.mesh,
    )
    assistant = Assistant.of(model, processor, decoding, flags.batch_size)

    def write(text: str) -> None:
        print(escaped(text, keep="\n\t"), end="", flush=True)

    if flags.chat:
        chat(assistant, flags.image, sys.stdin, write)
    elif flags.question is not None:
        for piece in assistant.stream(assistant.prompt(flags.question, flags.image)):
            write(piece)
        write("\n")
    else:
        outcome = answer_file(
            assistant,
            flags.questions,
            flags.output,
            model_id=flags.checkpoint,
            image_root=flags.image_root,
            on_bad=flags.on_bad,
        )
        print(f"{flags.output}: {outcome.answered} answered, {outcome.before} before, {len(outcome.skipped)} skipped")
        for message in outcome.skipped:
            print(f"skipped: {escaped(message)}", file=sys.stderr)


if __name__ == "__main__":
    run_door(main)
