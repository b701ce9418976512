"""``python -m benchmarks.peers``: how much faster than its peers this is, in one run and on one machine.

The same LLaVA (weights, adapters, batches, precision) is trained and asked by transformers with PEFT and by us; the
same block of routed LoRA experts is run in plain PyTorch and by us; attention is run by each kernel that there is.
Results are compared before anything is timed. Candidates run in turn, so that a drifting machine touches all alike, and
beside them stand the machine's ceilings: a large product and a large copy, measured in the same run. Writes JSON and
Markdown. Needs torch, transformers and peft beside our own requirements (docs/peers.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from benchmarks.measuring import Seconds, alternately, least, machine, speedup
from benchmarks.peer_cases import SIZES, Case, batch_of, case_of, prompts_of
from mole_jax.errors import UserError, run_door
from mole_jax.files import write_json, write_text
from mole_jax.planning.compile import with_layers

if TYPE_CHECKING:
    from benchmarks.peer_models import Ours, Theirs

ROOT = Path(__file__).parents[1]
PEERS = ("torch", "transformers", "peft")
PACKAGES = ("jax", "jaxlib", "flax", *PEERS)
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest distance from the peer, as the norm of the difference over that of the peer's: logits, loss, gradients,
outputs."""


TITLES = {"lora": "LoRA over PEFT's LoRA", "mole": "MoLE over PEFT's LoRA"}
SDPA = "torch sdpa"
SHARES = ("of ceiling", "peer of ceiling")
PASSES = ("forward", "forward and backward")
SECTIONS = {
    "training": "Training",
    "decoding": "Decoding, greedily with a cache: tokens after the first",
    "block": "One MoLE block, forward and backward, over plain PyTorch",
    "attention": "Attention, causal, over torch's scaled_dot_product_attention",
}
COLUMNS = {
    "tokens/s": "{:,.0f}",
    "peer's": "{:,.0f}",
    "of ceiling": "{:.0%}",
    "peer of ceiling": "{:.0%}",
    "whole answer": "{:.2f}",
}
"""Of a table, after ratio, quartiles and what: how their values are written."""


class Run:
    """One run: compares, measures, and keeps what it found in `result`."""

    def __init__(self, size: str, case: Case, rounds: int):
        self.sizes, self.case, self.rounds = SIZES[size], case, rounds
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.result: dict[str, Any] = {
            "size": size,
            "rounds": rounds,
            "machine": machine(PACKAGES),
            "case": dataclasses.asdict(case),
            "picture": case.arch.image_span,
            "tolerance": TOLERANCE[case.dtype],
            "distance": {},
        }

    def check(self, what: str, ours: Any, theirs: Any) -> None:
        """Keeps the distance of two results; raises `RuntimeError` if it is over the tolerance."""
        ours, theirs = (np.asarray(one, np.float64) for one in (ours, theirs))
        distance = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        self.result["distance"][what] = distance
        if not distance <= self.result["tolerance"]:
            raise RuntimeError(
                f"{what}: ours is {distance:.2g} off the peer's, at most {self.result['tolerance']:g} is"
            )

    def time(self, candidates: dict[str, Any]) -> Seconds:
        return alternately(candidates, self.rounds)

    def ceilings(self) -> None:
        """Measures the largest product and copy by each library; of several times the best counts."""
        from benchmarks.peer_ceilings import copies, products

        sizes = self.sizes
        calls = {
            "FLOP/s": (2.0 * sizes.product**3, products(sizes.product, self.case.dtype, self.device)),
            "bytes/s": (8.0 * sizes.copy, copies(sizes.copy, self.device)),
        }
        best = self.result.setdefault("ceilings", {})
        for unit, (work, candidates) in calls.items():
            seconds = self.time(candidates)
            found = best.setdefault(unit, dict.fromkeys(candidates, 0.0))
            found |= {name: max(found[name], work / least(seconds, name)) for name in candidates}

    def shares(self) -> None:
        """Turns what was reached a second into shares of the ceilings; the better library's counts for both."""
        for section, unit in {"training": "FLOP/s", "attention": "FLOP/s", "decoding": "bytes/s"}.items():
            ceiling = max(self.result["ceilings"][unit].values())
            for row in self.result[section]:
                for column in SHARES:
                    row[column] /= ceiling

    def models(self, folder: Path) -> None:
        """Compares and times training and decoding of the same LLaVA."""
        from benchmarks.peer_models import Ours, Theirs, write_base

        write_base(self.case, folder, self.device)
        batch = batch_of(self.case)
        base: dict[str, jax.Array] = {}
        ours = {kind: Ours(self.case, kind, folder, batch, base) for kind in ("lora", "mole")}
        lora, peft = ours["lora"], Theirs(self.case, folder, batch, ours["lora"], self.device)
        real = batch["segment_ids"] > 0
        self.check("logits", lora.logits()[real], peft.logits()[real])
        (loss, gradient), (their_loss, their_gradient) = lora.loss_and_gradient(), peft.loss_and_gradient()
        self.check("loss", loss, their_loss)
        assert gradient.keys() == their_gradient.keys()
        for side in ("lora_A", "lora_B"):
            names = [name for name in gradient if side in name]
            both = (np.concatenate([one[name].ravel() for name in names]) for one in (gradient, their_gradient))
            self.check(f"gradient of {side}", *both)
        self.result["tokens"] = int(real.sum())
        self.result["training"] = self.training(ours, peft, int(real.sum()))
        peft.end_training(lora)
        self.result["decoding"] = []
        for rows in (1, 8):
            self.result["decoding"] += self.decoding(ours, peft, prompts_of(self.case, rows))

    def training(self, ours: dict[str, Ours], peft: Theirs, tokens: int) -> list[dict[str, Any]]:
        """Times a step of each; `tokens` are those of the batch without padding."""
        seconds = self.time({"peft": peft.train} | {kind: one.train for kind, one in ours.items()})
        theirs = statistics.median(seconds["peft"])
        rows = []
        for kind, one in ours.items():
            middle = statistics.median(seconds[kind])
            rows.append(
                ratio(seconds, kind, "peft")
                | {
                    "what": f"step, {TITLES[kind]}",
                    "tokens/s": tokens / middle,
                    "peer's": tokens / theirs,
                    "of ceiling": one.flops / middle,
                    "peer of ceiling": ours["lora"].flops / theirs,
                }
            )
        return rows

    def decoding(self, ours: dict[str, Ours], peft: Theirs, prompts: list) -> list[dict[str, Any]]:
        """Compares greedy answers and times them: whole, and a token of them without the reading of the prompt."""
        count, what = self.case.answer, f"batch {len(prompts)}"
        answers, theirs = ours["lora"].generate(prompts, count), peft.generate(prompts, count)
        equal = float(np.mean(np.asarray(answers) == np.asarray(theirs)))
        self.result["distance"][f"{what}: answers' tokens that differ"] = 1 - equal
        if self.case.dtype == "float32" and equal < 1:
            raise RuntimeError(
                f"{what}: {100 * (1 - equal):.0f} % of the greedy answers' tokens differ from the peer's"
            )
        calls = {"peft": peft} | ours
        seconds = self.time(
            {
                f"{name} {tokens}": lambda one=one, tokens=tokens: one.generate(prompts, tokens)
                for name, one in calls.items()
                for tokens in (1, count)
            }
        )
        # A token after the first: what the longer answer takes beyond the shorter one of the same round.
        after = {
            name: [(b - a) / (count - 1) for a, b in zip(seconds[f"{name} 1"], seconds[f"{name} {count}"], strict=True)]
            for name in calls
        }
        cache = ours["lora"].cache_bytes(prompts, count)
        rows = []
        for kind, one in ours.items():
            middle, peers = (statistics.median(after[name]) for name in (kind, "peft"))
            rows.append(
                ratio(after, kind, "peft")
                | {
                    "what": f"{what}, {TITLES[kind]}",
                    "tokens/s": len(prompts) / middle,
                    "peer's": len(prompts) / peers,
                    "of ceiling": (one.weight_bytes + cache) / middle,
                    "peer of ceiling": (ours["lora"].weight_bytes + cache) / peers,
                    "whole answer": ratio(seconds, f"{kind} {count}", f"peft {count}")["ratio"],
                }
            )
        return rows

    def block(self) -> None:
        """Compares and times the block of routed experts, forward and backward."""
        from benchmarks.peer_block import Block, OurBlock, PlainBlock

        decoder, adapter = self.case.arch.decoder, self.case.adapter("mole")
        drawn = Block.random(decoder, adapter, self.sizes.block_tokens, self.case.dtype)
        ours = OurBlock(drawn, decoder, adapter)
        plain = {
            "loop with gathers": PlainBlock(drawn, self.device, gathers=True),
            "all experts on all tokens": PlainBlock(drawn, self.device, gathers=False),
        }
        y, gradient = ours.outcome()
        for name, one in plain.items():
            their_y, their_gradient = one.outcome()
            self.check(f"block, {name}: output", y, their_y)
            for array, value in their_gradient.items():
                self.check(f"block, {name}: gradient of {array}", gradient[array], value)
        seconds = self.time({"ours": ours.call} | {name: one.call for name, one in plain.items()})
        self.result["block"] = [
            ratio(seconds, "ours", name)
            | {
                "what": f"MoLE block over {name}",
                "tokens/s": self.sizes.block_tokens / statistics.median(seconds["ours"]),
                "peer's": self.sizes.block_tokens / statistics.median(seconds[name]),
            }
            for name in plain
        ]

    def attention(self) -> None:
        """Compares and times attention by each kernel, over torch's."""
        from benchmarks.peer_ceilings import as_arrays, attention_flops, attentions

        shape, rows = self.sizes.attention, []
        passes = attentions(shape, self.case.dtype, self.device)
        for what, flops, calls in zip(PASSES, attention_flops(shape), passes, strict=True):
            theirs = as_arrays(calls[SDPA]())
            kernels = [name for name in calls if name != SDPA]
            for name in kernels:
                for part, one, other in zip(("output", *"qkv"), as_arrays(calls[name]()), theirs, strict=False):
                    self.check(f"attention {name}, {what}: {part}", one, other)
            seconds = self.time(calls)
            rows += [
                ratio(seconds, name, SDPA)
                | {
                    "what": f"{name}, {what}",
                    "of ceiling": flops / statistics.median(seconds[name]),
                    "peer of ceiling": flops / statistics.median(seconds[SDPA]),
                }
                for name in kernels
            ]
        self.result["attention"] = rows


def ratio(seconds: Seconds, ours: str, theirs: str) -> dict[str, float]:
    middle, low, high = speedup(seconds, ours, theirs)
    return {"ratio": middle, "low": low, "high": high}


def page(result: dict[str, Any]) -> str:
    """Returns a run's result as Markdown, ratios first."""
    about, case = result["machine"], result["case"]
    decoder = case["arch"]["decoder"]
    ceilings = {
        what: ", ".join(f"{name} {value / 1e9:,.1f}" for name, value in found.items())
        for what, found in result["ceilings"].items()
    }
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    worst = max(result["distance"], key=result["distance"].__getitem__)
    kept = "all activations" if case["remat"] == "none" else "those between layers"
    about_run = (
        f"Made by `python -m benchmarks.peers --size {result['size']} --rounds {result['rounds']}`. The ratio is our "
        "speed over the peer's: the median of the rounds, in which candidates run in turn, with the quartiles beside.",
        f"- Machine: {about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB, {about['system']}; "
        f"device {about['device']}. When it began, {about['load_before']} processes ran or waited.",
        f"- Versions: {versions}.",
        f"- Model: {decoder['layers']} layers, d {decoder['width']}, MLP {decoder['mlp_width']}, vocabulary "
        f"{decoder['vocab']}, {case['dtype']}. LoRA on every projection of the decoder, rank {case['rank']}; MoLE of "
        f"{case['experts']} experts. We keep what `model.remat` {case['remat']} says, the peer {kept}.",
        f"- A step has {case['rows']} x {case['length']} tokens, {result['tokens']} of them no padding; a prompt is a "
        f"picture of {result['picture']} tokens with {case['question']} of text, an answer has {case['answer']}.",
        f"- Products, GFLOP/s: {ceilings['FLOP/s']}. Copies, GB/s read and written: {ceilings['bytes/s']}. The larger "
        "is the ceiling for both; measured at both ends of the run. A step counts its FLOPs without recomputation, "
        "decoding the bytes of weights and cache.",
        f"- Results were compared first. The largest distance is {result['distance'][worst]:.1e} ({worst}); "
        f"{result['tolerance']:g} is the most.",
    )
    first, *others = about_run
    lines = [f"# Peers: {result['size']}, {about['device']}", "", first, "", *others]
    for name, title in SECTIONS.items():
        rows = result[name]
        columns = [column for column in COLUMNS if column in rows[0]]
        lines += ["", f"## {title}", "", f"| ratio | quartiles | what | {' | '.join(columns)} |"]
        lines.append("|" + " --- |" * (3 + len(columns)))
        for row in rows:
            cells = [COLUMNS[column].format(row[column]) for column in columns]
            quartiles = f"{row['low']:.2f} to {row['high']:.2f}"
            lines.append(f"| **{row['ratio']:.2f}** | {quartiles} | {row['what']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small", help="small for CPUs, 7b for one large GPU")
    parser.add_argument("--rounds", type=int, default=9, help="counted calls of each candidate")
    parser.add_argument("--layers", type=int, help="decoder layers; default: as the size has")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the two files")
    flags = parser.parse_args()
    absent = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"peers: {', '.join(absent)} is not installed; docs/peers.md says how to make an environment")
    case = case_of(flags.size)
    if flags.layers is not None:
        case = dataclasses.replace(case, arch=with_layers(case.arch, flags.layers))
    run = Run(flags.size, case, flags.rounds)
    run.ceilings()
    run.attention()
    run.block()
    with tempfile.TemporaryDirectory() as folder:
        run.models(Path(folder))
    # Again, for the machine may have been busier at first.
    run.ceilings()
    run.shares()
    text = page(run.result)
    name = "peers_" + re.sub(r"\W+", "_", f"{flags.size} {run.result['machine']['device']}").lower()
    flags.output.mkdir(parents=True, exist_ok=True)
    write_json(flags.output / f"{name}.json", run.result)
    write_text(flags.output / f"{name}.md", text)
    print(text)


if __name__ == "__main__":
    # Two libraries share a GPU: neither may take its memory beforehand.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    run_door(main)
