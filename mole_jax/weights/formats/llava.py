"""Original LLaVA-1.5 checkpoints (``LlavaLlamaForCausalLM``, repository haotian-liu/LLaVA), seen as Hugging Face's.

The config is a Llama's with ``mm_`` fields beside; it names its vision tower instead of describing it, and a checkpoint
may hold the tower's weights or leave them to that name. The vocabulary has no ``<image>``; here, as in the converted
checkpoints of the hub, it grows by ``<image>`` and padding to a multiple of 64 (32000 to 32064). The rows added to
embedding and head are the mean of the others, so that no logit of theirs is ever the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mole_jax.errors import UserError
from mole_jax.files import PathLike, absolute, read_json
from mole_jax.weights.format import Format, Given
from mole_jax.weights.hf_checkpoint import HfCheckpoint, resolve
from mole_jax.weights.hf_config import CONFIG, architecture_from_hf, with_generation_file
from mole_jax.weights.safetensors_io import TensorFolder, tensor_files
from mole_jax.weights.sources import HfSource

PREFIXES = {
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.vision_tower.vision_tower.": "vision_tower.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
"""Their prefix and Hugging Face's; the first that fits is taken."""
TEXT_FIELDS = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
)
"""Fields that mean the same in a Llama's config."""
LANGUAGE_MODELS = ("llama", "mistral")
"""What a language model alone calls itself."""
ONLY: Mapping[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "mm_patch_merge_type": ("flat", None),
    "image_aspect_ratio": ("pad", "square", None),
}
"""What these fields may say: LLaVA-1.5; other values are models of another shape."""
SELECT = {"patch": "default", "cls_patch": "full"}
_L14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
TOWERS = {
    "openai/clip-vit-large-patch14-336": _L14 | {"image_size": 336},
    "openai/clip-vit-large-patch14": _L14 | {"image_size": 224},
}
_GROWN = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_TOWER = "vision_tower."


def is_llava(config: Mapping[str, Any]) -> bool:
    """Tells whether a config.json is of an original LLaVA on Llama."""
    return config.get("model_type") == "llava_llama" or "LlavaLlamaForCausalLM" in (config.get("architectures") or ())


def grown(vocab: int) -> int:
    """Returns the size of a vocabulary with ``<image>`` and ``<pad>``, padded to a multiple of 64."""
    return -(-(vocab + 2) // 64) * 64


def config_to_hf(config: Mapping[str, Any], *, where: epath.Path) -> dict[str, Any]:
    """Returns the content of the config.json that Hugging Face's LLaVA would have.

    Args:
        config: theirs.
        where: their file; a vision tower that is a folder may be named relative to it.

    Raises:
        UserError: a field says what LLaVA-1.5 does not have, or the vision tower is not known.
    """
    for key, supported in ONLY.items():
        if config.get(key) not in supported:
            words = " or ".join(repr(one) for one in supported if one is not None)
            raise UserError(f"{where}: '{key}' is {config.get(key)!r}, only {words} (LLaVA-1.5) is supported")
    vocab, select = config.get("vocab_size", 32000), config.get("mm_vision_select_feature", "patch")
    if isinstance(vocab, bool) or not isinstance(vocab, int) or vocab < 1:
        raise UserError(f"{where}: 'vocab_size' is {vocab!r}, expected a whole number of at least 1")
    if select not in SELECT:
        raise UserError(f"{where}: 'mm_vision_select_feature' is {select!r}, expected one of {', '.join(SELECT)}")
    text = {key: config[key] for key in TEXT_FIELDS if key in config}
    kind = config.get("model_type") if config.get("model_type") in LANGUAGE_MODELS else "llama"
    return {
        "model_type": "llava",
        "image_token_index": vocab,
        "text_config": text | {"model_type": kind, "vocab_size": grown(vocab)},
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "vision_config": _tower_config(config, where),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": SELECT[select],
    }


def joined(config: Mapping[str, Any], vision: epath.Path, *, where: epath.Path) -> dict[str, Any]:
    """Returns the config.json that an original LLaVA of this language model and the CLIP in `vision` would have.

    Raises:
        UserError: `config` is of no Llama, Vicuna or Mistral.
    """
    if config.get("model_type") not in LANGUAGE_MODELS:
        raise UserError(
            f"{where}: 'model_type' is {config.get('model_type')!r}; --vision joins a tower to a language model, "
            f"{' or '.join(LANGUAGE_MODELS)}"
        )
    return {**config, "mm_vision_tower": str(absolute(vision)), "mm_projector_type": "mlp2x_gelu"}


def tower_folder(config: Mapping[str, Any], where: epath.Path) -> epath.Path | None:
    """Returns the folder that ``mm_vision_tower`` names, absolute or relative to the checkpoint, if there is one."""
    name = config.get("mm_vision_tower")
    folder = where.parent / name if isinstance(name, str) and name else None
    return folder if folder is not None and folder.is_dir() else None


def _tower_config(config: Mapping[str, Any], where: epath.Path) -> dict[str, Any]:
    folder, name = tower_folder(config, where), config.get("mm_vision_tower")
    if folder is not None:
        found = read_json(folder / "config.json")
        return found.get("vision_config", found)  # a whole CLIP has a text model beside it
    if name not in TOWERS:
        raise UserError(
            f"{where}: 'mm_vision_tower' is {name!r}, neither a folder nor one of {', '.join(TOWERS)}; "
            "put the path of the CLIP folder there"
        )
    return TOWERS[name]


class LlavaTensors(TensorFolder):
    """The tensors of a checkpoint under Hugging Face's names, vocabulary grown; values are read when asked for."""

    def __init__(self, checkpoint: TensorFolder, vocab: int, tower: TensorFolder | None):
        """Joins them.

        Args:
            checkpoint: the LLaVA's files.
            vocab: rows that embedding and head are grown to.
            tower: a CLIP's files, for what the checkpoint has not. None: it has all.
        """
        self._places = {renamed(name): (checkpoint, name) for name in checkpoint.shapes}
        if tower is not None:
            for name in tower.shapes:
                if name.startswith(("vision_model.", "embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")):
                    self._places.setdefault(_TOWER + name, (tower, name))
        self.files = checkpoint.files + (tower.files if tower is not None else ())
        self.shapes = {ours: files.shapes[theirs] for ours, (files, theirs) in self._places.items()}
        self.types = {ours: files.types[theirs] for ours, (files, theirs) in self._places.items()}
        for name in _GROWN:
            # Of the right number of rows or not: what is not is left for the account of shapes to tell.
            if name in self.shapes and grown(self.shapes[name][0]) == vocab:
                self.shapes[name] = (vocab, *self.shapes[name][1:])
        self._means: dict[str, np.ndarray] = {}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        files, theirs = self._places[name]
        rows = files.shapes[theirs][0] if files.shapes[theirs] else 0
        if name not in _GROWN or self.shapes[name][0] == rows:
            return files.read(theirs, index)
        index = index or (slice(None),) * len(self.shapes[name])
        start, stop, _ = index[0].indices(self.shapes[name][0])
        if stop <= rows and start < rows:
            return files.read(theirs, index)
        if name not in self._means:
            whole = files.read(theirs)
            self._means[name] = whole.astype(np.float32).mean(axis=0, keepdims=True).astype(whole.dtype)
        mean = self._means[name][:, *index[1:]]
        added = np.repeat(mean, max(stop - max(start, rows), 0), axis=0)
        # An empty slice past the end is an error to safetensors.
        return added if start >= rows else np.concatenate([files.read(theirs, (slice(start, rows), *index[1:])), added])


def has_tower(checkpoint: TensorFolder) -> bool:
    """Tells whether a checkpoint holds the weights of its vision tower."""
    return any(renamed(name).startswith(_TOWER) for name in checkpoint.shapes)


def renamed(name: str) -> str:
    """Returns Hugging Face's name of one of theirs."""
    for theirs, ours in PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def open_llava(folder: PathLike, vision: str | None = None) -> HfCheckpoint:
    """Opens a folder or hub name.

    Args:
        folder: an original LLaVA, or a language model alone where `vision` is given; the two have no projector yet.
        vision: folder or hub name of a CLIP.

    Raises:
        UserError: as `HfCheckpoint.open`.
    """
    local = resolve(folder)
    config, where = read_json(local / CONFIG), local / CONFIG
    if vision is not None:
        config = joined(config, resolve(vision), where=where)
    architecture = architecture_from_hf(config_to_hf(config, where=where), where=str(where))
    architecture = with_generation_file(architecture, local)
    tensors = TensorFolder(tensor_files(local))
    apart = () if has_tower(tensors) else (tower_folder(config, where) or resolve(config["mm_vision_tower"]),)
    tower = TensorFolder(tensor_files(apart[0])) if apart else None
    ours = LlavaTensors(tensors, architecture.decoder.vocab, tower)
    return HfCheckpoint(local, architecture, ours, *apart, projector=vision is None)


def _recognise(given: Given) -> bool:
    return given.vision is not None or ((given.path / CONFIG).exists() and is_llava(read_json(given.path / CONFIG)))


def _read(given: Given) -> HfSource:
    return HfSource.of(open_llava(str(given.path), given.vision))


FORMAT = Format(
    name="llava",
    reads="an original LLaVA folder or hub name",
    recognise=_recognise,
    options=("vision",),
    read=_read,
)
