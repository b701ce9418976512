"""``python -m mole_jax.convert``: weights from one format to another."""

from __future__ import annotations

from mole_jax.cli import Parser, load_config
from mole_jax.errors import UserError, program, run_door
from mole_jax.files import absolute
from mole_jax.terminal import escaped
from mole_jax.weights import push
from mole_jax.weights.convert import convert
from mole_jax.weights.format import DTYPES
from mole_jax.weights.formats import choices, recognised


def main() -> None:
    parser = Parser(
        prog=program("convert"),
        description=f"Convert weights. The input's format is recognised: {recognised()}.",
    )
    parser.add_argument("--input", required=True, help="folder, file or hub name")
    parser.add_argument("--output", required=True, help="folder to write; must not hold a model yet")
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple(choices()),
        help="; ".join(f"{name}: {what}" for name, what in choices().items()),
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="type of all weights; default: each as it came, in a HF folder what was trained as most of the rest",
    )
    parser.add_argument("--base", help="model that the input's adapters stand on; default: the one that they name")
    parser.add_argument(
        "--vision",
        metavar="CLIP",
        help="folder or hub name of a CLIP: makes a LLaVA with a new projector of --input, a Llama, Vicuna or Mistral",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        help="scale times rank of a released LLaVA-MoLE file; default: as the file says, else twice the rank",
    )
    parser.add_argument(
        "--expert", type=int, metavar="K", help="keep only expert K (from 0) of each MLP, as plain LoRA (--to hf, peft)"
    )
    parser.add_argument(
        "--tasks",
        metavar="CONFIG",
        help="with --expert: score the mixture and the one expert on the evaluation.tasks of this config file, and "
        "print the difference; results go to OUTPUT/evaluation",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="send the written folder to this repository of the hub")
    parser.add_argument("--public", action="store_true", help="with --push: seen by all; default: private")
    parser.add_argument("--dry-run", action="store_true", help="with --push: list what would be sent, and send nothing")
    flags = parser.parse_args()
    config = None if flags.tasks is None else load_config(flags.tasks)
    if config is not None and (flags.expert is None or not config.evaluation.tasks):
        raise UserError("--tasks: goes with --expert, and with a config that has evaluation.tasks")
    if flags.push is not None:
        push.check_folder(flags.output)
        push.check_name(flags.push)
        if not flags.dry_run:
            push.check_repository(flags.push, public=flags.public)
    elif flags.public or flags.dry_run:
        raise UserError("--public and --dry-run: go with --push OWNER/NAME")
    line = convert(
        flags.input,
        flags.output,
        flags.to,
        flags.dtype,
        base=flags.base,
        alpha=flags.alpha,
        expert=flags.expert,
        vision=flags.vision,
    )
    print(escaped(line, keep="\n"))
    if flags.push is not None:
        print(escaped(_pushed(flags.output, flags.push, public=flags.public, dry=flags.dry_run), keep="\n"))
    if config is not None:
        from mole_jax.evaluation.compare import compare_checkpoints

        folder = absolute(flags.output) / "evaluation"
        found = compare_checkpoints(config, flags.input, flags.output, folder, base=flags.base, alpha=flags.alpha)
        print(escaped(found.text(), keep="\n"))


def _pushed(folder: str, name: str, *, public: bool, dry: bool) -> str:
    """Sends a folder to the hub, or with `dry` only looks at it; returns what to say."""
    files = push.files_of(folder)
    what = f"{len(files)} files, {sum(files.values()):,} bytes, {'public' if public else 'private'}"
    if dry:
        return "\n".join(
            [*(f"{size:>16,}  {file}" for file, size in files.items()), f"{name}: {what}; nothing was sent"]
        )
    return f"{push.push(folder, name, public=public)}: {what}"


if __name__ == "__main__":
    run_door(main)
