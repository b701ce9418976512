"""Prompt presets: how the turns of a conversation become text, here and as Jinja chat templates for transformers."""

from __future__ import annotations

import dataclasses
import json
import re

IMAGE = "<image>"
"""An image's place in the words of a turn."""


@dataclasses.dataclass(frozen=True)
class PromptPreset:
    """How turns become text.

    `{system} {user}: question {assistant}: answer</s>{user}: …`, as in Vicuna v1. With `plain` only the
    image, the caption and a newline are left, as in LLaVA's projector pretraining.
    """

    name: str
    system: str = ""
    user: str = "USER"
    assistant: str = "ASSISTANT"
    bos: bool = True
    """Start with the tokenizer's BOS (where it has one)."""
    plain: bool = False

    @property
    def stop_text(self) -> str | None:
        """Text that ends an answer, besides EOS."""
        return "\n" if self.plain else None


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

PROMPTS: dict[str, PromptPreset] = {
    "v1": PromptPreset("v1", VICUNA_SYSTEM),
    "llava_mole": PromptPreset("llava_mole", VICUNA_SYSTEM, bos=False),
    "no_system": PromptPreset("no_system"),
    "plain": PromptPreset("plain", plain=True),
}

# `said.text` becomes the words of a message, an image standing for itself.
_WORDS = """\
{%- set said = namespace(text='') -%}
{%- if message['content'] is string -%}
  {%- set said.text = message['content'] -%}
{%- else -%}
  {%- for part in message['content'] -%}
    {%- if part['type'] == 'image' -%}
      {%- set said.text = said.text + IMAGE + '\\n' -%}
    {%- elif part['type'] == 'text' -%}
      {%- set said.text = said.text + part['text'] -%}
    {%- else -%}
      {{- raise_exception('a part of a message is text or an image') -}}
    {%- endif -%}
  {%- endfor -%}
{%- endif -%}
"""
_CHAT = """\
{{- SYSTEM -}}
{%- for message in messages -%}
WORDS
{%- set images = said.text.split(IMAGE) | length - 1 -%}
{%- if message['role'] == 'user' -%}
  {%- if images == 1 -%}
    {%- set said.text = (IMAGE + '\\n' + (said.text | replace(IMAGE, '') | trim)) | trim -%}
  {%- endif -%}
  {{- USER + ': ' + said.text + ' ' -}}
{%- elif message['role'] == 'assistant' and not images -%}
  {{- ASSISTANT + ': ' + said.text + eos_token -}}
{%- else -%}
  {{- raise_exception('a message is of the user, or of the assistant and without images') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- ASSISTANT + ':' -}}
{%- endif -%}
"""
_PLAIN = """\
{%- for message in messages -%}
WORDS
{%- set images = said.text.split(IMAGE) | length - 1 -%}
{%- if loop.first and message['role'] == 'user' and images == 1 -%}
  {{- IMAGE -}}
{%- elif loop.index == 2 and message['role'] == 'assistant' and not images -%}
  {{- said.text + '\\n' -}}
{%- else -%}
  {{- raise_exception('this prompt takes one image, and its caption') -}}
{%- endif -%}
{%- endfor -%}
"""


def chat_template(prompt: PromptPreset, *, image: str = IMAGE) -> str:
    """Returns a preset as a Jinja template, for transformers' `apply_chat_template`.

    The text that it makes has no BOS, as with LLaVA's own: the tokenizer adds it, here as to any other text. Parts of a
    message are joined, an image is a line of its own; then what holds for a turn of `mole_jax.data.conversation` holds.

    Args:
        prompt: the preset.
        image: text of the token in whose place an image stands.
    """
    names = {
        "SYSTEM": json.dumps(prompt.system and prompt.system + " "),
        "USER": json.dumps(prompt.user),
        "ASSISTANT": json.dumps(prompt.assistant),
        "IMAGE": json.dumps(image),
    }
    text = (_PLAIN if prompt.plain else _CHAT).replace("WORDS\n", _WORDS)
    return re.sub("|".join(names), lambda found: names[found[0]], text)
