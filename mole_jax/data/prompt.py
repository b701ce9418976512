"""Which prompt a base is asked with: the one that the config names, or the one that its own files speak for."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, cast

from etils import epath

from mole_jax.config import DataConfig, PromptName
from mole_jax.errors import UserError
from mole_jax.files import read_json
from mole_jax.prompts import PROMPTS, chat_template
from mole_jax.tokenizer import CONFIG_FILE, Tokenizer

VICUNA: PromptName = "v1"
_VICUNA_MODELS = (None, "llava", "llava_llama", "llama", "mixtral")
"""`model_type` of what may be LLaVA-1.5, or its decoder; mixtral is what its merged experts are exported as."""


def with_prompt(data: DataConfig, tokenizer: Tokenizer) -> DataConfig:
    """Returns `data` with the prompt that it leaves to the base.

    A preset whose template stands beside the tokenizer; v1 for LLaVA-1.5, whose folders have a template that says
    Vicuna's words without an end, or none at all; the checkpoint's own for any other with a template.

    Raises:
        UserError: there is no template and it is no Vicuna, so that no one knows how it was asked.
    """
    return data if data.prompt is not None else dataclasses.replace(data, prompt=_own(tokenizer))


def template_text(folder: epath.Path) -> str | None:
    """Returns the chat template of a checkpoint's folder; None without one.

    As transformers' processors look for it: chat_template.jinja, chat_template.json, tokenizer_config.json.

    Raises:
        UserError: a file of these cannot be read, or has several templates and none of the name default.
    """
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    for name in ("chat_template.json", CONFIG_FILE):
        found = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, list):
            found = _default({one.get("name"): one.get("template") for one in found if isinstance(one, dict)}, folder)
        if isinstance(found, str):
            return found
    return None


def _default(several: dict[Any, Any], folder: epath.Path) -> str:
    if not isinstance(found := several.get("default"), str):
        raise UserError(
            f"{folder / CONFIG_FILE}: 'chat_template' has no template of the name 'default' among {sorted(several)}; "
            "name one so, or put chat_template.jinja beside it"
        )
    return found


def _own(tokenizer: Tokenizer) -> PromptName:
    folder = tokenizer.source_files[0].parent
    text, (model, decoder) = template_text(folder), _model_types(folder)
    if text is None:
        if decoder in _VICUNA_MODELS and tokenizer.token(tokenizer.eos_id) == "</s>":
            return VICUNA
        raise UserError(
            f"config: {folder} has no chat template and is no Vicuna, so how it is asked is not known; put "
            f"chat_template.jinja there, or name one of {', '.join(PROMPTS)} in data.prompt"
        )
    # v1's is llava_mole's too: the BOS, in which they differ, is the tokenizer's.
    for name, preset in PROMPTS.items():
        if text == chat_template(preset):
            return cast(PromptName, name)
    return VICUNA if "ASSISTANT:" in text and model in _VICUNA_MODELS else "checkpoint"


def _model_types(folder: epath.Path) -> tuple[str | None, str | None]:
    """Returns `model_type` of the model in a folder and of its decoder; None where its config.json has none."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None, None  # no config, or none that says anything of a tokenizer: whoever opens the weights tells
    model = config.get("model_type") if isinstance(config, dict) else None
    text = config.get("text_config") if isinstance(config, dict) else None
    return model, text.get("model_type") if isinstance(text, dict) else model
