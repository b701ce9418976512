"""Whatever weights are called, opened: recognised by their format, with their tokenizer, placed on the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import jax
from etils import epath

from mole_jax.config import Config, ModelConfig, Quantisation
from mole_jax.errors import UserError
from mole_jax.files import absolute
from mole_jax.model.architecture import check_features, preset
from mole_jax.model.quantised import Quantised, quantise
from mole_jax.model.spec import ModelSpec
from mole_jax.parallel.mesh import make_mesh
from mole_jax.prompts import IMAGE
from mole_jax.tokenizer import Tokenizer
from mole_jax.weights import formats
from mole_jax.weights.format import Given, Opened
from mole_jax.weights.hf_checkpoint import resolve
from mole_jax.weights.source import Source
from mole_jax.weights.sources import RandomSource


def open_source(name: str, *, base: str | None = None, alpha: float | None = None, vision: str | None = None) -> Opened:
    """Opens weights of any format.

    Args:
        name: a run's folder (its newest checkpoint, or one named as FOLDER/checkpoints/STEP), a HF or original LLaVA
            folder, a hub name, a PEFT, MixLoRA or MoLE adapter folder, or a released LLaVA-MoLE file.
        base: what adapters stand on. None: what they name themselves.
        alpha: the scale's numerator, for a released LLaVA-MoLE file. None: as the file says, else twice its rank.
        vision: a CLIP's folder or hub name, to make a LLaVA of the language model `name`.

    Raises:
        UserError: it is none of these, what it holds does not fit together, or `base` is given to a whole model.
    """
    path = absolute(name)
    if not path.exists():
        path = epath.Path(resolve(name))
    given = Given(name=name, path=path, open=open_source, base=base, alpha=alpha, vision=vision)
    for one in formats.FORMATS:
        if one.read is not None and one.recognise(given):
            _check_options(given, one.options)
            return one.read(given)
    raise UserError(
        f"{name}: neither a run's folder (checkpoints/) nor a HF folder (config.json, *.safetensors) nor adapters"
    )


def _check_options(given: Given, options: Collection[str]) -> None:
    if given.vision is not None and (given.base, given.alpha) != (None, None):
        raise UserError(f"{given.name}: with --vision it is a language model, so leave out --base and --alpha")
    if given.base is not None and "base" not in options:
        raise UserError(f"{given.name}: holds no adapters without a base; leave out --base {given.base}")
    if given.alpha is not None and "alpha" not in options:
        raise UserError(f"{given.name}: says its own alpha, if it has adapters; leave out --alpha {given.alpha:g}")


def open_base(config: ModelConfig, seed: int) -> Source:
    """Opens what a training run starts from, with the config's changes to the architecture.

    Raises:
        UserError: as `open_source`, or the base carries adapters of its own.
    """
    source = RandomSource(preset(config.preset), seed) if config.preset else open_source(str(config.base))
    if source.adapter.kind != "none":
        raise UserError(
            f"config: model.base {config.base} carries {source.adapter.kind} adapters; train from its own base"
            + (", or merge them first with convert --to hf" if source.adapter.kind == "lora" else "")
        )
    changes = {
        "feature_layer": config.feature_layer,
        "feature_select": config.feature_select,
        "image_vectors": config.image_vectors or None,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    architecture = dataclasses.replace(source.architecture, **changes)
    check_features(architecture, where="config: model")
    return dataclasses.replace(source, architecture=architecture)


def tokenizer_path(config: ModelConfig, source: Source) -> str:
    """Returns where the tokenizer is.

    Raises:
        UserError: neither the config nor the base has one.
    """
    path = config.tokenizer or source.tokenizer
    if path is None:
        raise UserError(
            "config: model.tokenizer is not set and there is no tokenizer.model or tokenizer.json beside the weights; "
            "name a folder that has one"
        )
    return path


def check_vocabulary(tokenizer: Tokenizer, vocab: int) -> None:
    """Raises `UserError` if the tokenizer has ids that the model's embedding lacks."""
    if tokenizer.vocab_size > vocab:
        raise UserError(
            f"config: model.tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {vocab}; "
            "use the tokenizer that belongs to the checkpoint"
        )


def check_image_token(tokenizer: Tokenizer, image_id: int) -> None:
    """Raises `UserError` if the tokenizer has a word where the model has images: it would be read as one."""
    word = tokenizer.token(image_id)
    if word is not None and not tokenizer.is_special(image_id) and word != IMAGE:
        raise UserError(
            f"config: model.tokenizer has the word {word!r} as {image_id}, where the model has images; "
            "use the tokenizer that belongs to the checkpoint"
        )


def place(
    spec: ModelSpec,
    source: Source,
    mesh: jax.sharding.Mesh,
    trainable: Collection[str],
    frozen_dtype: str,
    seed: int,
    quantised: Quantisation | None = None,
) -> dict[str, jax.Array | Quantised]:
    """Loads what `source` has straight into its shardings and makes the rest from the seed."""
    abstract = spec.abstract(mesh, trainable, frozen_dtype, quantised)
    loaded: dict[str, jax.Array | Quantised] = {
        **source.load({path: leaf for path, leaf in abstract.items() if not isinstance(leaf, Quantised)}),
        **_quantised(source, {path: leaf for path, leaf in abstract.items() if isinstance(leaf, Quantised)}),
    }
    made = spec.initial({path: leaf for path, leaf in abstract.items() if path not in loaded}, seed)
    return {path: (loaded | made)[path] for path in abstract}


def _quantised(source: Source, abstract: Mapping[str, Quantised]) -> dict[str, Quantised]:
    """Loads kernels and quantises them one after the other: of one at a time the devices hold the floats."""
    stored, found = source.leaves(abstract), {}
    for path, leaf in abstract.items():
        if path not in stored:
            continue
        # In the type of the file, which is exact and takes the least room.
        floats = jax.ShapeDtypeStruct(stored[path].shape, stored[path].dtype, sharding=leaf.values.sharding)
        places = jax.tree.map(lambda one: one.sharding, leaf)
        program = jax.jit(quantise, static_argnums=1, out_shardings=places)
        found[path] = jax.block_until_ready(program(source.load({path: floats})[path], leaf.kind))
    return found


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model whose weights, tokenizer and mesh are known to fit; its arrays are loaded when asked for."""

    source: Source
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    spec: ModelSpec
    trainable: tuple[str, ...]
    """Groups that are float32."""
    model: ModelConfig
    """How the frozen arrays are stored."""
    seed: int
    """Seed of the arrays that no file holds."""

    def place(self) -> dict[str, jax.Array | Quantised]:
        """Returns all arrays by path, on the mesh.

        Raises:
            UserError: the mesh does not divide them, or they cannot be read.
        """
        return place(
            self.spec,
            self.source,
            self.mesh,
            trainable=self.trainable,
            frozen_dtype=self.model.float_dtype,
            seed=self.seed,
            quantised=self.model.quantised,
        )


def open_model(config: Config, checkpoint: Source | None = None) -> OpenModel:
    """Opens a model with its tokenizer; of `config` it reads model, mesh, adapter, train.trainable and seed.

    Args:
        config: what is trained: `model.base` under new adapters of `adapter`.
        checkpoint: weights that were trained already. They bring adapters, trained groups and seed themselves, and
            how their base was quantised.

    Raises:
        UserError: the weights cannot be opened, there is no tokenizer or not the model's, or there are too few devices.
    """
    mesh = make_mesh(config.mesh)
    if checkpoint is None:
        source = open_base(config.model, config.seed)
        adapter, trainable, seed = config.adapter, config.train.trainable, config.seed
    else:
        source, adapter, trainable, seed = checkpoint, checkpoint.adapter, checkpoint.trained, checkpoint.seed
        config = dataclasses.replace(config, model=with_own_quantisation(config.model, checkpoint))
    tokenizer = Tokenizer.load(tokenizer_path(config.model, source))
    check_vocabulary(tokenizer, source.architecture.decoder.vocab)
    spec = ModelSpec.of(source.architecture, adapter)
    return OpenModel(
        source=source,
        tokenizer=tokenizer,
        mesh=mesh,
        spec=spec,
        trainable=trainable,
        model=config.model,
        seed=seed,
    )


def with_own_quantisation(model: ModelConfig, source: Source) -> ModelConfig:
    """Returns `model` with the base quantised as it was when these weights were trained on it, if it was."""
    return model if source.quantised is None else dataclasses.replace(model, frozen_dtype=source.quantised)
