"""``python -m mole_jax.convert``: weights from one format to another."""

from __future__ import annotations

from mole_jax.cli import Parser
from mole_jax.errors import run_door

FORMATS = {
    "hf": "a HF LLaVA folder: plain LoRA merged, a MoLE as a stock Mixtral of merged experts",
    "peft": "a PEFT adapter folder (plain LoRA)",
    "llava_mole": "the released LLaVA-MoLE's state dict",
    "mole": "this project's adapter folder: all that was trained, without the base",
    "run": "a run's folder: a base for train, or adapters with the name of their base",
}


def main() -> None:
    parser = Parser(
        prog="python -m mole_jax.convert",
        description="Convert weights. The input's format is recognised: a HF or original LLaVA folder, a hub name, a "
        "run's folder, a PEFT or MoLE adapter folder, a released LLaVA-MoLE file (.safetensors, .npz; .pt with torch).",
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
        "--alpha",
        type=float,
        help="scale times rank of a released LLaVA-MoLE file; default: as the file says, else twice the rank",
    )
    parser.add_argument(
        "--expert", type=int, metavar="K", help="keep only expert K (from 0) of each MLP, as plain LoRA (--to hf, peft)"
    )
    flags = parser.parse_args()
    from mole_jax.weights.convert import convert

    line = convert(
        flags.input, flags.output, flags.to, flags.dtype, base=flags.base, alpha=flags.alpha, expert=flags.expert
    )
    print(line)


if __name__ == "__main__":
    run_door(main)
