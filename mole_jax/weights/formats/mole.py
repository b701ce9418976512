"""This project's own adapter folder: what a run trained and what it says about itself, without its base.

``adapter_config.json`` is the checkpoint's `mole_jax.weights.run.Meta` (architecture, ranks, targets, router setting,
prompt preset, image preparation, base and its hash) with ``"peft_type": "MOLE_JAX"``, so that PEFT refuses it by name.
``adapter_model.safetensors`` has our arrays as they are, layers stacked, "." for "/" in their paths.
"""

from __future__ import annotations

from etils import epath

from mole_jax.errors import UserError
from mole_jax.files import made, read_json, write_json
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.model.spec import ModelSpec
from mole_jax.parameters import group_of
from mole_jax.weights.foreign import AdapterFile, Row, read_table
from mole_jax.weights.format import Export, Format, Given, over_base, trained_arrays
from mole_jax.weights.run import Meta
from mole_jax.weights.safetensors_io import TensorFolder, write_file
from mole_jax.weights.sources import LayeredSource

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KIND = {"peft_type": "MOLE_JAX"}
# What a run may change in its base's architecture (`mole_jax.weights.open.open_base`).
CHANGES = ("feature_layer", "feature_select", "image_vectors")


def is_mole(folder: epath.Path) -> bool:
    """Tells whether `folder` is one of these."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("peft_type") == KIND["peft_type"]


def read_mole(folder: epath.Path, arch: LlavaArchitecture) -> AdapterFile:
    """Reads adapters; `arch` is the base's.

    Raises:
        UserError: the folder is of another version, or its tensors and its config do not fit together.
    """
    where = folder / CONFIG
    values = {key: value for key, value in read_json(where).items() if key not in KIND}
    meta = Meta.from_json(values, where=str(where))
    if not (folder / TENSORS).is_file():
        raise UserError(f"{folder / TENSORS}: no such file; copy the whole folder")
    files = TensorFolder((folder / TENSORS,))
    arrays = read_table(
        files,
        _table(meta),
        where=folder / TENSORS,
        what=f"tensors do not fit {CONFIG}",
        asks=CONFIG,
    )
    return AdapterFile(
        adapter=meta.adapter,
        arrays=arrays,
        trained=meta.trained,
        changes={name: getattr(meta.architecture, name) for name in CHANGES},
        prompt=meta.prompt,
        image_aspect=meta.image_aspect,
        base_hash=meta.base_hash,
        quantised=meta.quantised,
    )


def _table(meta: Meta) -> dict[str, Row]:
    """Returns the arrays that `meta` says were trained."""
    declarations = ModelSpec.of(meta.architecture, meta.adapter).declarations
    return {
        path: Row((path.replace("/", "."),), tuple(parameter.shape), lambda names, read: read(names[0]))
        for path, parameter in declarations.items()
        if group_of(parameter) in meta.trained
    }


def _read(given: Given) -> LayeredSource:
    return over_base(given, read_json(given.path / CONFIG).get("base"), read_mole)


def _check(export: Export) -> None:
    if export.base is None:
        raise UserError(
            f"{export.where}: stands on no base that has a name, so its adapters cannot travel alone; use --to hf"
        )


def _write(export: Export, folder: str) -> None:
    """Writes what was trained, and what it says about itself: its base is the one that the adapters stand on."""
    output = made(epath.Path(folder))
    tensors = {path.replace("/", "."): leaf for path, leaf in export.leaves.items()}
    write_file(output / TENSORS, tensors, {"format": "np"})
    meta = export.meta(export.adapter, tuple(dict.fromkeys((*export.source.trained, "adapters", "router"))))
    write_json(output / CONFIG, KIND | meta.to_json(), indent=2)
    export.save_tokenizer(folder)


FORMAT = Format(
    name="mole",
    reads="this project's adapter folder",
    recognise=lambda given: is_mole(given.path),
    options=("base",),
    read=_read,
    writes="this project's adapter folder: all that was trained, without the base",
    every_setting=True,
    wants=trained_arrays,
    check=_check,
    write=_write,
)
