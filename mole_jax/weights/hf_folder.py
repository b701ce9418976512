"""What stands beside the tensors in a Hugging Face LLaVA folder: config, tokenizer, and how images are prepared."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from mole_jax.clip import CLIP_MEAN, CLIP_STD
from mole_jax.errors import UserError
from mole_jax.files import write_json
from mole_jax.model.architecture import LlavaArchitecture
from mole_jax.weights.hf_config import eos_to_hf
from mole_jax.weights.leaf import Leaf
from mole_jax.weights.safetensors_io import write_tensors

CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)


def write_folder(
    folder: str | Path,
    config: dict,
    arch: LlavaArchitecture,
    tensors: Mapping[str, Leaf],
    *,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: str | Path | None = None,
) -> None:
    """Writes tensors (`write_tensors`) and all the small files that stand beside them.

    Raises:
        UserError: `tokenizer` has no tokenizer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, tensors, max_shard_bytes)
    copy_tokenizer(folder, tokenizer)
    write_json(folder / "generation_config.json", _generation(arch), indent=2)
    write_json(folder / "preprocessor_config.json", _preprocessor(arch), indent=2)
    write_json(folder / "processor_config.json", _processor(arch), indent=2)
    write_json(folder / CONFIG, config, indent=2)  # last: a folder without it is seen to be unfinished


def copy_tokenizer(folder: Path, source: str | Path | None) -> None:
    """Copies the tokenizer's files; with None, none.

    Raises:
        UserError: `source` has no tokenizer.
    """
    if source is None:
        return
    found = [Path(source) / name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    if not {"tokenizer.model", "tokenizer.json"} & {file.name for file in found}:
        raise UserError(f"{source}: holds neither tokenizer.model nor tokenizer.json")
    for file in found:
        shutil.copyfile(file, folder / file.name)


def _generation(arch: LlavaArchitecture) -> dict:
    decoder = arch.decoder
    return {"bos_token_id": decoder.bos_id, "eos_token_id": eos_to_hf(decoder), "pad_token_id": decoder.pad_id}


def _preprocessor(arch: LlavaArchitecture) -> dict:
    side = arch.vision.image_size
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,  # to a square, with the mean colour, as LLaVA-1.5 trains; transformers' default is off
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "LlavaImageProcessor",
        "image_std": list(CLIP_STD),
        "processor_class": "LlavaProcessor",
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }


def _processor(arch: LlavaArchitecture) -> dict:
    return {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,  # the class token, which the strategy "default" takes off again
        "patch_size": arch.vision.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "full" if arch.feature_select == "full" else "default",
    }
