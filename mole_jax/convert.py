"""``python -m mole_jax.convert``: weights from one format to another."""

from __future__ import annotations

from mole_jax.cli import Parser
from mole_jax.errors import run_door


def main() -> None:
    parser = Parser(
        prog="python -m mole_jax.convert",
        description="Convert weights. The input's format is recognised: a HF LLaVA folder, a hub name, a run's folder.",
    )
    parser.add_argument("--input", required=True, help="HF LLaVA folder, hub name, or run's folder")
    parser.add_argument("--output", required=True, help="folder to write; must not hold a model yet")
    parser.add_argument(
        "--to", required=True, choices=("hf", "run"), help="hf: a HF LLaVA folder (LoRA merged); run: a base for train"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="type of the weights")
    flags = parser.parse_args()
    from mole_jax.weights.convert import convert

    print(convert(flags.input, flags.output, flags.to, flags.dtype))


if __name__ == "__main__":
    run_door(main)
