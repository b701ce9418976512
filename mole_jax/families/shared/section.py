"""One object of a foreign config: fields are read with their limits, and none is left over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole_jax.errors import UserError
from mole_jax.model.architecture import LIMITS

MAX_NUMBER = (1 << 31) - 1
"""Largest of the whole numbers that have no limit of their own: ids and positions are of 32 bits."""
MAX_IDS = 1_000
_MAX_FLOAT = 1e30
_MISSING = object()
_LIMIT = {
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
"""Our name of a size, whose limit is in `LIMITS`."""

_BOOKKEEPING = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
}
_BOOKKEEPING |= {"auto_map", "dtype", "model_type", "name_or_path", "processor_class", "tokenizer_class", "torch_dtype"}
_BOOKKEEPING |= {"torchscript", "transformers.js_config", "transformers_version", "_flash_attn_2_enabled", "mole_jax"}
_FIRST_VALUES = {"initializer_factor", "initializer_range", "layer_scale_init_value"}
_THEIR_TRAINING = {"attention_dropout", "dropout", "hidden_dropout_prob", "ignore_index", "neftune_noise_alpha"}
_THEIR_TRAINING |= {"projection_dropout"}
_THEIR_RUNTIME = {"chunk_size_feed_forward", "output_attentions", "output_hidden_states", "pretraining_tp"}
_THEIR_RUNTIME |= {"return_dict", "tf_legacy_loss", "use_bfloat16", "use_cache"}
_GENERATION = {"bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample"}
_GENERATION |= {"early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"}
_GENERATION |= {"forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length"}
_GENERATION |= {"no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores"}
_GENERATION |= {"remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens"}
_GENERATION |= {"temperature", "top_k", "top_p", "typical_p", "sep_token_id", "prefix"}
_OTHER_TASKS = {"finetuning_task", "id2label", "label2id", "problem_type", "task_specific_params"}
IGNORED = frozenset(_BOOKKEEPING | _FIRST_VALUES | _THEIR_TRAINING | _THEIR_RUNTIME | _GENERATION | _OTHER_TASKS)
"""Fields of any config that change nothing of what the model computes: who wrote it and how, first values, dropout and
losses of another trainer, how transformers runs it, settings of its generation, labels of other tasks."""
OFF = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}
"""Fields that old files have in every object, and the value at which they change nothing."""


class Section:
    """One object of a config with its place in messages and its defaults; it remembers what was asked for."""

    def __init__(self, values: Any, where: str, defaults: Mapping[str, Any] | None = None):
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected an object, found {values!r}")
        self.values, self.where, self.defaults = values, where, defaults or {}
        self._asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """Returns a field as it is; of a missing one transformers' default."""
        self._asked.add(key)
        value = self.values.get(key, _MISSING)
        return self.defaults.get(key, None if default is _MISSING else default) if value is _MISSING else value

    def integer(self, key: str, default: Any = _MISSING, least: int = 1) -> int:
        """Returns a whole number within its limits; raises `UserError` for anything else."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{self.where}: '{key}' is {value!r}, expected a whole number of at least {least}")
        if value > (limit := LIMITS.get(_LIMIT.get(key, ""), MAX_NUMBER)):
            raise UserError(f"{self.where}: '{key}' is {value}, the limit is {limit:,}; the file is damaged")
        return value

    def square(self, key: str, default: Any = _MISSING) -> int:
        """Returns a side that the file gives once, or twice the same; raises `UserError` for anything else."""
        value = self.get(key, default)
        if isinstance(value, list):
            if len(value) != 2 or value[0] != value[1]:
                raise UserError(f"{self.where}: '{key}' is {value!r}, only squares are supported")
            value = value[0]
        return Section({key: value}, self.where).integer(key)

    def number(self, key: str, default: Any = _MISSING) -> float:
        """Returns a number over 0; raises `UserError` for anything else."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MAX_FLOAT:
            raise UserError(f"{self.where}: '{key}' is {value!r}, expected a number over 0 (and under {_MAX_FLOAT:g})")
        return float(value)

    def only(self, key: str, *supported: Any, default: Any = _MISSING) -> Any:
        """Returns a field that has one of these values; raises `UserError` where it has another."""
        value = self.get(key, supported[0] if default is _MISSING else default)
        # 1 == True in Python, so types are compared too.
        if not any(value == one and type(value) is type(one) for one in supported):
            words = " or ".join(repr(one) for one in supported)
            raise UserError(f"{self.where}: '{key}' is {value!r}, only {words} is supported")
        return value

    def ids(self, key: str, default: Any = None) -> list[int]:
        """Returns an id or a list of them as a list without repetitions; of null, none.

        Raises:
            UserError: it is neither.
        """
        value = self.get(key, default)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if len(values) > MAX_IDS:
            raise UserError(f"{self.where}: '{key}' has {len(values)} ids, the limit is {MAX_IDS}")
        return list(dict.fromkeys(Section({key: one}, self.where).integer(key, least=0) for one in values))

    def check_all_read(self, *also: str, ignored: frozenset[str] = IGNORED) -> None:
        """Raises `UserError` that names a field which nothing asked for and which is not known to change nothing.

        Args:
            also: fields besides those of `ignored` that may say anything.
            ignored: fields that may say anything. What is null says nothing.
        """
        for key, off in OFF.items():
            if key not in self._asked:
                self.only(key, off, None)
        for key, value in self.values.items():
            if key not in self._asked and key not in ignored and key not in also and value is not None:
                raise UserError(
                    f"{self.where}: '{key}' is not known here and may make the model another one; remove it if it "
                    "changes nothing"
                )
