"""A model without its arrays: what every array is called, its shape and its sharding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mole_jax.adapters.build import Adapters
from mole_jax.config import AdapterConfig, Quantisation
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.model.llava import Llava
from mole_jax.model.quantised import Quantised, quantise, quantises
from mole_jax.model.quantised import abstract as abstract_kernel
from mole_jax.parallel.sharding import check_whole, parameter_sharding
from mole_jax.parameters import Parameter, declared, group_of, streams


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model without its arrays: what to make and what every array is called."""

    arch: LlavaArchitecture
    adapter: AdapterConfig
    graph: nnx.GraphDef
    declarations: Mapping[str, Parameter]

    @classmethod
    def of(cls, arch: LlavaArchitecture, adapter: AdapterConfig) -> ModelSpec:
        model = nnx.eval_shape(lambda: Llava(arch, Adapters(adapter), streams(0)))
        return cls(arch, adapter, nnx.graphdef(model), declared(model))

    def abstract(
        self,
        mesh: jax.sharding.Mesh,
        trainable: Collection[str],
        frozen_dtype: str,
        quantised: Quantisation | None = None,
    ) -> dict[str, jax.ShapeDtypeStruct | Quantised]:
        """Returns shape, type and sharding of every array; groups in `trainable` are float32.

        `quantised`: how frozen projections of the decoder's layers are, if they are.

        Raises:
            UserError: the mesh does not divide a parameter.
        """

        def leaf(path: str, parameter: Parameter) -> jax.ShapeDtypeStruct | Quantised:
            trains, place = group_of(parameter) in trainable, parameter_sharding(path, parameter, mesh)
            if quantised is not None and quantises(path) and not trains:
                return abstract_kernel(path, parameter.shape, quantised, place)
            dtype = jnp.float32 if trains else jnp.dtype(frozen_dtype)
            return jax.ShapeDtypeStruct(parameter.shape, dtype, sharding=place)

        heads = {"attention heads": self.arch.decoder.heads, "key-value heads": self.arch.decoder.kv_heads}
        check_whole(mesh, "tensor", heads | {"attention heads of the vision tower": self.arch.vision.heads})
        check_whole(mesh, "expert", {"experts (adapter.experts)": self.adapter.experts})
        return {path: leaf(path, parameter) for path, parameter in self.declarations.items()}

    def initial(
        self, abstract: Mapping[str, jax.ShapeDtypeStruct | Quantised], seed: int
    ) -> dict[str, jax.Array | Quantised]:
        """Makes these arrays from the seed, each on its devices; the values do not depend on the mesh."""
        if not abstract:
            return {}
        return _initialiser(self.arch, self.adapter, tuple(abstract.items()))(np.uint32(seed))


@functools.lru_cache(maxsize=16)
def _initialiser(
    arch: LlavaArchitecture,
    adapter: AdapterConfig,
    leaves: tuple[tuple[str, jax.ShapeDtypeStruct | Quantised], ...],
) -> Callable[[np.uint32], dict[str, jax.Array | Quantised]]:
    """Returns the program that makes arrays from a seed, compiled once for all seeds."""

    def make(seed: jax.Array) -> dict[str, jax.Array | Quantised]:
        made = declared(Llava(arch, Adapters(adapter), streams(seed)))
        return {
            path: quantise(made[path][...], leaf.kind)
            if isinstance(leaf, Quantised)
            else made[path][...].astype(leaf.dtype)
            for path, leaf in leaves
        }

    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, dict(leaves)))
