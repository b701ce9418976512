"""``python -m mole_jax.convert``: weights from one format to another."""

from __future__ import annotations

from mole_jax.cli import Parser, load_config
from mole_jax.errors import UserError, run_door
from mole_jax.terminal import escaped

FORMATS = {
    "hf": "a HF LLaVA folder: plain LoRA merged, a MoLE as a stock Mixtral of merged experts",
    "peft": "a PEFT adapter folder (plain LoRA)",
    "llava_mole": "the released LLaVA-MoLE's state dict",
    "mixlora": "MoE-PEFT's MixLoRA directory",
    "mole": "this project's adapter folder: all that was trained, without the base",
    "run": "a run's folder: a base for train, or adapters with the name of their base",
}


def main() -> None:
    parser = Parser(
        prog="python -m mole_jax.convert",
        description="Convert weights. The input's format is recognised: a HF or original LLaVA folder, a hub name, a "
        "run's folder, a PEFT, MixLoRA or MoLE adapter folder, a released LLaVA-MoLE file (.safetensors, .npz, .pt).",
    )
    parser.add_argument("--input", required=True, help="folder, file or hub name")
    parser.add_argument("--output", required=True, help="folder to write; must not hold a model yet")
    parser.add_argument(
        "--to",
        required=True,
        choices=tuple(FORMATS),
        help="; ".join(f"{name}: {what}" for name, what in FORMATS.items()),
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type of the weights; default: float32 for what was trained, else, and for all of a HF folder, bfloat16",
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
    from mole_jax.weights.convert import convert

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
        from mole_jax.weights.run import absolute

        folder = absolute(flags.output) / "evaluation"
        found = compare_checkpoints(config, flags.input, flags.output, folder, base=flags.base, alpha=flags.alpha)
        print(escaped(found.text(), keep="\n"))


if __name__ == "__main__":
    run_door(main)
