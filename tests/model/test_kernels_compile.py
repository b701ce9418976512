"""The attention kernels' programs, compiled for chips that are not here; libtpu or the CUDA plugin is needed for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mole_jax.model.kernels import gpu, splash
from mole_jax.planning import topology

pytestmark = pytest.mark.slow
ROWS, HEADS, LENGTH, WIDTH = 2, 32, 2048, 128
MIB = 1 << 20


def compiled(name: str, attend) -> jax.stages.Compiled:
    """Packed, causal attention, forward and backward, in bfloat16 on one device; heads come as products write them."""
    mesh = Mesh(np.array(topology.devices_of(name)[:1]), ("one",))
    place = NamedSharding(mesh, PartitionSpec())
    heads = jax.ShapeDtypeStruct((ROWS, LENGTH, HEADS, WIDTH), jnp.bfloat16, sharding=place)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=place)

    def both(q, k, v, ids, dy):
        y, pull = jax.vjp(lambda *heads: attend(*(x.swapaxes(1, 2) for x in heads), ids, True).swapaxes(1, 2), q, k, v)
        return y, pull(dy)

    with jax.set_mesh(mesh):
        return jax.jit(both).lower(heads, heads, heads, ids, heads).compile()


@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2"])
def test_splash_compiles_for_a_tpu_and_keeps_no_scores(monkeypatch, name):
    if not topology._installed("libtpu"):
        pytest.skip("needs libtpu to compile for a TPU (no hardware): 'jax[tpu]' in an environment of its own")
    pytest.importorskip("tokamax")
    for variable, value in topology.TPU_ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    memory = compiled(name, splash.attend).memory_analysis()
    assert memory.temp_size_in_bytes < 2 * ROWS * HEADS * LENGTH * LENGTH  # two bytes for each score


@pytest.mark.parametrize("name", ["h100:8", "h200:8", "l4:1"])
def test_triton_compiles_for_a_gpu_in_80_mib(name):
    if not topology._installed("jax_cuda13_plugin"):
        pytest.skip("needs the CUDA plugin to compile for a GPU (no hardware), in an environment of its own")
    pytest.importorskip("tokamax")
    from absl import flags
    from tokamax.config import cross_compile

    flags.FLAGS.mark_as_parsed()
    with cross_compile(True):
        memory = compiled(name, functools.partial(gpu.attend, kernel="triton")).memory_analysis()
    print(f"{name}: {memory.temp_size_in_bytes / MIB:.0f} MiB")
    assert memory.temp_size_in_bytes < 80 * MIB
