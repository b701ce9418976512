"""Kernels, scatters and slices in a program of the TPU's own compiler: kept as text, and compiled anew with libtpu.

``python -m tests.planning.test_kernels`` writes the text again.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mole_jax.parallel.devices import CHIPS
from mole_jax.planning import topology
from mole_jax.planning.cost import Kernels, cost_of
from mole_jax.planning.hlo import HloModule, parse_instruction, whole_lines
from mole_jax.planning.predict import KERNEL_SHARE, kernel_time

KEPT = Path(__file__).with_name("v5e_kernels.hlo")

TRIPS, ROWS, HEADS, LENGTH, WIDTH, BLOCK = 3, 2, 2, 512, 128, 256
VOCAB, TOKENS, EMBED = 32_000, 512, 1024
SEEN = 3 / 4
"""Of 2 x 2 blocks of the scores those that a causal mask does not leave out."""


def compiled() -> str:
    """Attention of two rows by tokamax's kernel, three times over, and a scatter-add into a table, for one v5e."""
    kernels = pytest.importorskip("tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_kernel")
    masks = pytest.importorskip("tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_mask")
    from jax.experimental import pallas as pl

    declared = pl.CostEstimate(flops=flops_of_a_row(), transcendentals=0, bytes_accessed=bytes_of_a_row())
    config = kernels.SplashConfig(block_q=BLOCK, block_kv=BLOCK, fwd_cost_estimate=declared)
    kernel = kernels.make_splash_mha(masks.CausalMask((LENGTH, LENGTH)), config=config, q_seq_shards=1)

    def run(q, k, v, table, ids, rows):
        x, _ = jax.lax.scan(lambda x, _: (jax.vmap(kernel)(x, k, v), None), q, None, length=TRIPS)
        return x, table.at[ids].add(rows)

    place = jax.sharding.SingleDeviceSharding(topology.devices_of("v5e:2x2")[0])
    heads = jax.ShapeDtypeStruct((ROWS, HEADS, LENGTH, WIDTH), jnp.bfloat16, sharding=place)
    table, rows = (jax.ShapeDtypeStruct((n, EMBED), jnp.float32, sharding=place) for n in (VOCAB, TOKENS))
    ids = jax.ShapeDtypeStruct((TOKENS,), jnp.int32, sharding=place)
    lowered = jax.jit(run, donate_argnames="table").lower(heads, heads, heads, table, ids, rows)
    text = lowered.compile().as_text()
    assert text is not None
    return text


def flops_of_a_row() -> int:
    """Scores and their products with the values."""
    return int(2 * 2 * HEADS * LENGTH * LENGTH * WIDTH * SEEN)


def bytes_of_a_row() -> int:
    """q, k, v and the result, two bytes a number."""
    return 4 * HEADS * LENGTH * WIDTH * 2


@pytest.fixture(scope="module", params=["kept", "compiled"])
def text(request) -> str:
    if request.param == "kept":
        return KEPT.read_text()
    if not topology._installed("libtpu"):
        pytest.skip("needs libtpu to compile for a TPU (no hardware): 'jax[tpu]' in an environment of its own")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in topology.TPU_ENVIRONMENT.items():
            patch.setenv(name, value)
        return compiled()


def test_a_kernel_counts_with_what_it_declares_for_each_row_and_trip(text):
    kernels = cost_of(HloModule(text), {"one": 1}).kernels
    assert kernels.flops == TRIPS * ROWS * flops_of_a_row()
    assert kernels.traffic == TRIPS * ROWS * bytes_of_a_row()
    assert kernels.count == TRIPS + 1


def test_a_scatter_counts_with_what_it_writes_and_not_with_its_table(text):
    moved = cost_of(HloModule(text), {"one": 1}).kernels.undeclared
    # What is added is read, and as much of the table read and written; beside it only the indices.
    rows, table = TOKENS * EMBED * 4, VOCAB * EMBED * 4
    assert 3 * rows <= moved <= 3 * rows + TOKENS * 4
    assert moved < table / 10


def test_every_instruction_of_a_program_with_metadata_over_several_lines_is_read(text):
    module = HloModule(text)
    begun = [line for line in text.splitlines() if re.match(r"\s+(ROOT )?%[\w.\-]+ = ", line)]
    assert any(not line.startswith(("}", " ", "%", "ENTRY")) for line in text.partition("ENTRY")[0].splitlines()[1:])
    assert sum(map(len, module.computations.values())) == len(begun)
    kernel = next(one for body in module.computations.values() for one in body.values() if "splash" in one.name)
    assert (kernel.opcode, kernel.cycles) == ("custom-call", 0)


def test_braces_in_quotes_open_nothing():
    lines = ['  %a = f32[] custom-call(), metadata={op_name="a{{\\"b{"}', "  ROOT %b = f32[] negate(%a)"]
    assert list(whole_lines("\n".join(lines))) == lines
    second = parse_instruction(lines[1])
    assert second is not None
    assert second.operands == ("a",)


def test_the_time_of_kernels_is_their_flops_at_a_share_of_the_peak_or_their_bytes():
    chip = CHIPS["TPU v5 lite"]
    bound = Kernels(count=1, flops=10**13, traffic=10**9)
    assert kernel_time(bound, chip) == pytest.approx(10**13 / (KERNEL_SHARE * 197e12))
    assert kernel_time(dataclasses.replace(bound, traffic=10**12), chip) == pytest.approx(1e12 / 819e9)
    # Gathers and scatters wait for memory alone, and so add to it.
    added = kernel_time(dataclasses.replace(bound, undeclared=10**11), chip) - kernel_time(bound, chip)
    assert added == pytest.approx(1e11 / 819e9)


if __name__ == "__main__":
    topology.no_accelerator()
    # The kernel's own code, where its source lies and what else nothing here reads are left out.
    found = re.sub(r'"(body|debug_locations)":"[^"]*"', r'"\1":""', compiled())
    found = re.sub(r"\nFileNames\n.*?\n\n\n", "\n\n", found, flags=re.DOTALL)
    KEPT.write_text(re.sub(r" stack_frame_id=\d+", "", found))
