"""Weights from one format to another; the input's format is recognised."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from mole_jax.config import AdapterConfig, MeshConfig
from mole_jax.data.tokenizer import Tokenizer
from mole_jax.errors import UserError
from mole_jax.parallel.mesh import make_mesh
from mole_jax.training.state import ModelSpec, place
from mole_jax.weights import run
from mole_jax.weights.hf import write_hf
from mole_jax.weights.merge import merged
from mole_jax.weights.source import open_source

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def convert(source_path: str, output: str, to: str, dtype: str) -> str:
    """Writes the weights at `source_path` to the folder `output` and returns what was done, in a line.

    `to` is ``hf`` (a Hugging Face LLaVA folder; plain LoRA is merged) or ``run`` (a run's folder that holds
    a whole base, which loads straight into any sharding). Weights are written as `dtype`.

    Raises:
        UserError: the input is not recognised or cannot be brought into that format, or the output exists.
    """
    folder = run.absolute(output)
    if (folder / "config.json").exists() or run.latest_step(folder) is not None:
        raise UserError(f"{output}: already holds a model; choose another --output or remove it")
    source = open_source(source_path)
    spec = ModelSpec.of(source.architecture, source.adapter)
    # One device: what is converted is written from this host anyway.
    leaves = place(spec, source, make_mesh(MeshConfig(data=1)), source.trained, dtype, source.seed)
    tokenizer = source.tokenizer
    if to == "hf":
        arrays = merged({path: np.asarray(leaf) for path, leaf in leaves.items()}, source.adapter, where=source_path)
        write_hf(output, source.architecture, arrays, DTYPES[dtype], tokenizer=tokenizer)
    else:
        if source.adapter.kind != "none":
            raise UserError(f"{source_path}: is a run with {source.adapter.kind} adapters already; convert it --to hf")
        leaves = {path: leaf.astype(dtype) for path, leaf in leaves.items()}
        meta = run.Meta(
            architecture=source.architecture,
            adapter=AdapterConfig(kind="none"),
            trained=(),
            prompt=source.prompt,
            image_aspect=source.image_aspect,
            base=None,
            base_hash=source.content_hash(),
            seed=source.seed,
        )
        run.write_params(folder, leaves, meta)
        if tokenizer is not None:
            Tokenizer.load(tokenizer).save(str(folder))
    return f"{output}: {len(leaves)} arrays, {sum(leaf.size for leaf in leaves.values()):,} numbers as {dtype}"
