"""Counts that repeat exactly for a few small steps, against those kept in counts.json: a step that got dearer is named.

``REMAKE_COUNTS=1 pytest tests/planning/test_counts.py`` writes the file again, to be looked at and committed with what
changed it. The TPU's count is only written, and compared, where libtpu is installed (docs/pods.md has the environment).
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mole_jax.model.architecture import preset
from mole_jax.parallel.mesh import make_mesh
from mole_jax.planning import topology
from mole_jax.planning.compile import Step, abstract_step, compiler_version
from mole_jax.planning.cost import cost_of
from mole_jax.planning.hlo import HloModule
from mole_jax.planning.work import inside, products
from mole_jax.training.setup import compiled_step
from tests import tiny

KEPT = Path(__file__).with_name("counts.json")
REMAKE = "REMAKE_COUNTS=1 pytest tests/planning/test_counts.py"
OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_multi_thread_eigen": False}
"""The same programs whatever XLA_FLAGS say, and however many cores there are."""
Counts = dict[str, int]


def step_of(devices: list[Any] | None = None, **sections: dict[str, Any]) -> Step:
    """The tiny recipe in bfloat16 with everything recomputed."""
    model = {"remat": "full", "frozen_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    config = tiny.config(Path("data"), **{"model": model} | sections)
    return abstract_step(config, preset("tiny"), make_mesh(config.mesh, devices))


def training(step: Step) -> tuple[Step, jax.stages.Traced]:
    with jax.set_mesh(step.mesh):
        return step, compiled_step(step.train_step, step.state, step.mesh).trace(step.state, step.frozen, step.batch)


def decoding(step: Step) -> tuple[Step, jax.stages.Traced]:
    """One more token for each of four rows that have 32 places."""
    rows, slots, dtype = 4, 32, jnp.dtype(jnp.bfloat16)

    def next_token(params, frozen, tokens, cache):
        decoder = nnx.merge(step.spec.graph, params, frozen).decoder
        hidden, cache = decoder.cached(decoder.embed(tokens, dtype), cache, jnp.ones(rows, jnp.int32))
        return jnp.argmax(decoder.logits(hidden[:, -1]), axis=-1), cache

    def empty(params, frozen):
        return nnx.merge(step.spec.graph, params, frozen).decoder.empty_cache(rows, slots, dtype)

    with jax.set_mesh(step.mesh):
        weights = step.state.params, step.frozen
        cache = jax.eval_shape(empty, *weights)
        tokens = jax.ShapeDtypeStruct((rows, 1), np.int32)
        return step, jax.jit(next_token, donate_argnums=3).trace(*weights, tokens, cache)


MESH = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
STEPS: dict[str, Callable[[], tuple[Step, jax.stages.Traced]]] = {
    "LoRA on one device": lambda: training(step_of(adapter={"kind": "lora"}, train={"trainable": ("adapters",)})),
    "MoLE on one device": lambda: training(step_of()),
    "MoLE on one device, base in int8": lambda: training(
        step_of(model={"remat": "full", "frozen_dtype": "int8", "compute_dtype": "bfloat16"})
    ),
    "MoLE on fsdp 2 x expert 2 x tensor 2": lambda: training(step_of(mesh=MESH, adapter={"experts": 2})),
    "MoLE, one token decoded": lambda: decoding(step_of()),
}


def counts_of(step: Step, traced: jax.stages.Traced) -> Counts:
    """Returns what a step takes: equations and products of what is traced, the rest of what is compiled."""
    compiled = traced.lower().compile(compiler_options=OPTIONS)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    cost = cost_of(HloModule(text), dict(step.mesh.shape))
    jaxpr = traced.jaxpr.jaxpr
    found = {
        "equations of the step": equations(jaxpr),
        "equations of a layer, most of any loop": max(map(equations, loops(jaxpr)), default=0),
        "FLOPs of matrix products, all devices": products(jaxpr),
        "bytes read and written": cost.traffic,
        "temporary memory": memory.temp_size_in_bytes,
        "new memory of results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    exchanged: collections.Counter[str] = collections.Counter()
    for one in cost.collectives:
        name = f"{one.kind} over {' x '.join(one.axes)}"
        exchanged[f"{name}, times"] += one.count
        exchanged[f"{name}, bytes"] += one.count * one.payload
    return found | dict(sorted(exchanged.items()))


def equations(jaxpr: Any) -> int:
    return sum(1 + sum(map(equations, inside(one))) for one in jaxpr.eqns)


def loops(jaxpr: Any) -> Iterator[Any]:
    """Yields the bodies of all scans."""
    for one in jaxpr.eqns:
        for inner in inside(one):
            if one.primitive.name == "scan":
                yield inner
            yield from loops(inner)


def changes(kept: Counts, found: Counts) -> list[str]:
    """Returns a line for each count that is not what it was, those that grew first."""

    def line(name: str) -> str:
        before, now = kept.get(name, 0), found.get(name, 0)
        share = f" ({100 * (now / before - 1):+.2f} %)" if before else ""
        return f"{'grew' if now > before else 'shrank'}: {name}, {before:,} -> {now:,}{share}"

    return sorted(line(name) for name in kept | found if kept.get(name, 0) != found.get(name, 0))


def compare(name: str, found: Counts, versions: dict[str, str]) -> None:
    """Compares with the file, or writes into it; programs of another version of jax or compiler are others."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if os.environ.get("REMAKE_COUNTS"):
        kept[name] = {"made with": versions, "counts": found}
        KEPT.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
        return
    if kept[name]["made with"] != versions:
        pytest.skip(f"{KEPT.name} was made with {kept[name]['made with']}, this is {versions}; {REMAKE}")
    told = changes(kept[name]["counts"], found)
    assert not told, f"{name}:\n" + "\n".join([*told, f"if that is meant: {REMAKE}"])


@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_what_it_took(name):
    compare(name, counts_of(*STEPS[name]()), {"jax": jax.__version__})


@pytest.mark.skipif(
    not topology._installed("libtpu"),
    reason="needs libtpu to compile for a TPU (no hardware): 'jax[tpu]' in an environment of its own",
)
def test_a_step_takes_a_tpu_the_cycles_it_took(monkeypatch):
    for name, value in topology.TPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    step, traced = training(step_of(topology.devices_of("v5e:2x2")[:1]))
    compiled = traced.lower().compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    cost = cost_of(HloModule(text), dict(step.mesh.shape))
    found = {
        "cycles": cost.cycles or 0,
        "bytes read and written": cost.traffic,
        "temporary memory": memory.temp_size_in_bytes,
    }
    compare("MoLE on one v5e", found, {"jax": jax.__version__, "compiler": compiler_version("tpu")})


def test_what_changed_is_named_with_how_much():
    kept, found = {"cycles": 200, "bytes": 10, "times": 1, "same": 3}, {"cycles": 210, "bytes": 9, "new": 2, "same": 3}
    assert changes(kept, found) == [
        "grew: cycles, 200 -> 210 (+5.00 %)",
        "grew: new, 0 -> 2",
        "shrank: bytes, 10 -> 9 (-10.00 %)",
        "shrank: times, 1 -> 0 (-100.00 %)",
    ]
