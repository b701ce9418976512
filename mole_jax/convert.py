"""``python -m mole_jax.convert``: weights from one format to another."""

from __future__ import annotations

from mole_jax.cli import Parser, load_config
from mole_jax.errors import UserError, program, run_door
from mole_jax.files import absolute
from mole_jax.terminal import escaped
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
    flags = parser.parse_args()
    config = None if flags.tasks is None else load_config(flags.tasks)
    if config is not None and (flags.expert is None or not config.evaluation.tasks):
        raise UserError("--tasks: goes with --expert, and with a config that has evaluation.tasks")
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
    if config is not None:
        from mole_jax.evaluation.compare import compare_checkpoints

        folder = absolute(flags.output) / "evaluation"
        found = compare_checkpoints(config, flags.input, flags.output, folder, base=flags.base, alpha=flags.alpha)
        print(escaped(found.text(), keep="\n"))


if __name__ == "__main__":
    run_door(main)
