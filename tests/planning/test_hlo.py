"""Compiled programs read: collectives, loops and memory traffic, on eight simulated devices and from known sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mole_jax.planning.cost import Kernels, cost_of
from mole_jax.planning.groups import axes_of, replica_groups
from mole_jax.planning.hlo import HloModule, parse_instruction, parse_shapes

SIZES = {"data": 2, "fsdp": 4}
ROWS, WIDTH = 16, 128


@pytest.fixture(scope="module")
def mesh():
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=auto)


def compiled(mesh, function, *specs):
    """Text of a program in which each device has (ROWS, WIDTH) float32 numbers of every argument."""
    run = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))
    shapes = []
    for spec in specs:
        parts = [
            int(np.prod([SIZES[axis] for axis in np.atleast_1d(cut or ())], initial=1)) for cut in (*spec, None, None)
        ]
        place = jax.NamedSharding(mesh, spec)
        shapes.append(jax.ShapeDtypeStruct((ROWS * parts[0], WIDTH * parts[1]), jnp.float32, sharding=place))
    return run.lower(*shapes).compile().as_text()


HERE = ROWS * WIDTH * 4


@pytest.mark.parametrize(
    ("kind", "axes", "payload", "sent", "function"),
    [
        # A ring of n devices: each sends n - 1 pieces of an n-th; an all-reduce goes round twice.
        ("all-reduce", ("fsdp",), HERE, 2 * HERE * 3 / 4, lambda x: jax.lax.psum(x, "fsdp")),
        ("all-reduce", ("data", "fsdp"), HERE, 2 * HERE * 7 / 8, lambda x: jax.lax.psum(x, ("data", "fsdp"))),
        ("all-gather", ("data",), 2 * HERE, HERE, lambda x: jax.lax.all_gather(x, "data", tiled=True)),
        ("reduce-scatter", ("fsdp",), HERE, HERE * 3 / 4, lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True)),
        ("all-to-all", ("fsdp",), HERE, HERE * 3 / 4, lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)),
        ("collective-permute", ("data",), HERE, HERE, lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])),
    ],
)
def test_collective_has_its_axis_and_its_bytes(mesh, kind, axes, payload, sent, function):
    found = cost_of(HloModule(compiled(mesh, lambda x: function(x) * 2, P(("data", "fsdp")))), mesh.shape).collectives
    assert [(one.kind, one.axes, one.payload, one.sent, one.count) for one in found] == [(kind, axes, payload, sent, 1)]


def test_collectives_that_share_a_channel_count_each(mesh):
    def function(x):
        return jax.lax.psum(jnp.sin(jax.lax.psum(jnp.sin(jax.lax.psum(x, "fsdp")), "fsdp")), "fsdp")

    module = HloModule(compiled(mesh, function, P(("data", "fsdp"))))
    reduced = [one for body in module.computations.values() for one in body.values() if one.opcode == "all-reduce"]
    assert [one.attributes.count("channel_id=1,") for one in reduced] == [1, 1, 1]
    assert [one.count for one in cost_of(module, mesh.shape).collectives] == [3]


def test_collective_in_nested_loops_counts_as_often_as_it_runs(mesh):
    def function(x):
        def inner(x, _):
            return jnp.sin(jax.lax.psum(x, "data")), None

        def outer(x, _):
            return jax.lax.scan(inner, jax.lax.psum(x, "fsdp") * 2, None, length=5)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    found = cost_of(HloModule(compiled(mesh, function, P(("data", "fsdp")))), mesh.shape).collectives
    assert {one.axes: one.count for one in found} == {("data",): 15, ("fsdp",): 3}


def test_the_loop_of_a_differentiated_scan_keeps_its_inputs_for_the_backward_pass():
    # As many rows as layers: what a loop only carries has the first axis of what it stacks.
    layers, rows, width = 6, 6, 32

    def loss(weights, x):
        layer = jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None), prevent_cse=False)
        return jax.lax.scan(layer, x, weights)[0].sum()

    shapes = jax.ShapeDtypeStruct((layers, width, width), jnp.float32), jax.ShapeDtypeStruct((rows, width), jnp.float32)
    text = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile().as_text()
    # Full rematerialisation: of each layer the input alone is kept, not the 4 times larger weights.
    assert cost_of(HloModule(text), {"data": 1}).kept == layers * rows * width * 4


def test_dearer_branch_of_a_conditional_counts(mesh):
    def function(x, flag):
        return jax.lax.cond(flag[0, 0] > 0, lambda x: jnp.sin(jax.lax.psum(x, "data")), lambda x: x, x)

    found = cost_of(HloModule(compiled(mesh, function, P(("data", "fsdp")), P())), mesh.shape).collectives
    assert {(one.axes, one.count) for one in found} == {(("data",), 1)}


def test_traffic_of_one_product_is_its_operands_and_its_result():
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    text = jax.jit(lambda a, b: a @ b).lower(shape, shape).compile().as_text()
    assert cost_of(HloModule(text), {"data": 1}).traffic == 3 * 64 * 64 * 4


def test_traffic_of_a_slice_leaves_out_what_it_does_not_read():
    stack, index = jax.ShapeDtypeStruct((100, 64), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    text = jax.jit(lambda stack, i: stack[i] * 2).lower(stack, index).compile().as_text()
    assert cost_of(HloModule(text), {"data": 1}).traffic < 100 * 64 * 4 / 2


# What XLA:TPU writes and the CPU's compiler does not: no note of the trip count, an overlapped collective that stands
# in several fusions under one channel, a reduce-scatter as a fusion, estimated cycles, and arrays in near memory, S(1).
TPU = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%gather_start (p: f32[4,8]) -> f32[16,8] {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.1 = f32[16,8]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
}

%gather_done (p: f32[4,8]) -> f32[16,8] {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.2 = f32[16,8]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
}

%all-reduce-scatter.3 (p: f32[16,8]) -> f32[4,8] {
  %p = f32[16,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.4 = f32[16,8]{1,0:T(8,128)} all-reduce(%p), channel_id=9, replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[4,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.4, %zero, %zero), dynamic_slice_sizes={4,8}
}

%condition (state: (s32[], f32[4,8])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %first = f32[16,8]{1,0:T(8,128)S(1)} fusion(%x), kind=kCustom, calls=%gather_start, backend_config={"estimated_cycles":"100"}
  %second = f32[16,8]{1,0:T(8,128)S(1)} fusion(%x), kind=kCustom, calls=%gather_done, backend_config={"estimated_cycles":"20"}
  %kernel = f32[4,8]{1,0:T(8,128)S(1)} custom-call(%second), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"0","bytes_accessed":"64"}}}
  %y = f32[4,8]{1,0:T(8,128)} fusion(%second), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %tuple = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%i, %y)
}

ENTRY %main (p0: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p0 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  ROOT %while.5 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%p0), condition=%condition, body=%body
}
"""  # noqa: E501


def test_what_the_tpu_compiler_writes_otherwise():
    cost = cost_of(HloModule(TPU), {"data": 2, "fsdp": 4})
    array = 16 * 8 * 4
    assert {(one.kind, one.axes, one.payload, one.sent, one.count) for one in cost.collectives} == {
        ("all-gather", ("fsdp",), array, array * 3 / 4, 3),
        ("reduce-scatter", ("fsdp",), array, array * 3 / 4, 3),
    }
    assert cost.cycles == 3 * 120
    # A kernel without an estimate is counted apart, by what it declares; fusions that only exchange are not.
    assert cost.kernels == Kernels(3, 3 * 1000, 3 * 64)
    # A trip reads x twice and writes y; what is in near memory costs no traffic.
    assert cost.traffic == 3 * 3 * 4 * 8 * 4


# As a token is decoded: a fusion reads one layer of a stacked kernel through a fusion and a bitcast within it; another
# puts new keys into a cache that it returns.
NESTED = """HloModule step, is_scheduled=true

%slice_of (stack: f32[32,8,8], i: s32[]) -> f32[1,8,8] {
  %stack = f32[32,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8,8]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,8,8}
}

%product (x: f32[4,8], stack: f32[32,64], i: s32[]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %stack = f32[32,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %seen = f32[32,8,8]{2,1,0} bitcast(%stack)
  %layer = f32[1,8,8]{2,1,0} fusion(%seen, %i), kind=kLoop, calls=%slice_of
  %kernel = f32[8,8]{1,0} bitcast(%layer)
  ROOT %dot = f32[4,8]{1,0} dot(%x, %kernel), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%put (old: f32[4,100,8], new: f32[4,1,8], i: s32[]) -> f32[4,100,8] {
  %old = f32[4,100,8]{2,1,0} parameter(0)
  %new = f32[4,1,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %written = f32[4,100,8]{2,1,0} dynamic-update-slice(%old, %new, %zero, %i, %zero)
}

%write (cache: f32[4,100,8], new: f32[4,8], i: s32[]) -> f32[4,100,8] {
  %cache = f32[4,100,8]{2,1,0} parameter(0)
  %new = f32[4,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %one = f32[4,1,8]{2,1,0} bitcast(%new)
  %made = f32[4,100,8]{2,1,0} fusion(%cache, %one, %i), kind=kLoop, calls=%put
  ROOT %cast = f32[4,100,8]{2,1,0} bitcast(%made)
}

ENTRY %main (x: f32[4,8], stack: f32[32,64], cache: f32[4,100,8], i: s32[]) -> (f32[4,8], f32[4,100,8]) {
  %x = f32[4,8]{1,0} parameter(0)
  %stack = f32[32,64]{1,0} parameter(1)
  %cache = f32[4,100,8]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  %y = f32[4,8]{1,0} fusion(%x, %stack, %i), kind=kOutput, calls=%product
  %written = f32[4,100,8]{2,1,0} fusion(%cache, %y, %i), kind=kLoop, calls=%write
  ROOT %tuple = (f32[4,8]{1,0}, f32[4,100,8]{2,1,0}) tuple(%y, %written)
}
"""


def test_fusions_in_fusions_are_looked_through():
    x, layer, index = 4 * 8 * 4, 8 * 8 * 4, 4
    # x, one layer of the stack and its number in, y out; then y in, one place of the cache out, and the number again.
    assert cost_of(HloModule(NESTED), {"data": 1}).traffic == (x + layer + index + x) + (x + x + index)


def test_loop_without_a_readable_bound_is_not_guessed():
    with pytest.raises(ValueError, match=r"while\.5"):
        cost_of(HloModule(TPU.replace("constant(3)", "parameter(1)")), {"data": 2, "fsdp": 4})


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("fsdp",)),
        ("replica_groups={}", ("data", "fsdp")),
        ("replica_groups=[2,4]<=[8]", ("fsdp",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ("data",)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ("fsdp",)),
        ("replica_groups={{0,5},{1,6},{2,7},{3,4}}", ("?",)),
    ],
)
def test_every_notation_of_groups_finds_its_axes(groups, axes):
    assert axes_of(f"channel_id=1, {groups}, dimensions={{0}}", SIZES)[0] == axes


def test_groups_over_the_inner_part_of_an_axis():
    # Eight devices counted as 2 x 4: the first part of 2 joins devices that are 4 apart.
    found = replica_groups("replica_groups=mesh['a'=8] {'a':(1)2}", 8)
    assert found == {frozenset((i, i + 4)) for i in range(4)}


def test_shapes_have_the_bytes_of_their_types():
    shapes = parse_shapes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[], pred[8], u8[5]{0}, s4[4])")
    assert [(one.dims, one.bytes, one.near) for one in shapes] == [
        ((2, 3), 12, True),
        ((), 4, False),
        ((8,), 8, False),
        ((5,), 5, False),
        ((4,), 2, False),
    ]


def test_a_line_that_is_no_instruction_is_passed_over():
    assert parse_instruction("FileNames") is None
