"""The formats of weights, one file each. A new one is a file with a `FORMAT`, and its place in the tuple below."""

from __future__ import annotations

from mole_jax.weights.format import Format
from mole_jax.weights.formats import hf, llava, llava_mole, merged_experts, mixlora, mole, peft, run

FORMATS: tuple[Format, ...] = (
    mole.FORMAT,
    mixlora.FORMAT,
    peft.FORMAT,
    llava_mole.FORMAT,
    run.FORMAT,
    llava.FORMAT,
    hf.FORMAT,
    merged_experts.FORMAT,
)
"""In the order in which an input is tried: what is like another one but more special comes first."""


def choices() -> dict[str, str]:
    """Returns what can be written: the names that ``--to`` knows, in order, and what each of them is."""
    return {
        name: ", ".join(one.writes for one in written_as(name)) for name in sorted({one.choice for one in _written()})
    }


def written_as(choice: str) -> list[Format]:
    """Returns the formats that ``--to`` knows by that name."""
    return [one for one in _written() if one.choice == choice]


def recognised() -> str:
    """Returns what can be read, in words."""
    return ", ".join(one.reads for one in FORMATS if one.reads)


def _written() -> list[Format]:
    return [one for one in FORMATS if one.write is not None]
