"""The decoders: ``text_config`` of Llama, Mistral, Qwen2 and Qwen3, to and from ours, and their tensors' names."""

from __future__ import annotations

from typing import Any

from mole_jax.errors import UserError
from mole_jax.families.shared.names import TRANSPOSE, Row, affine, linear
from mole_jax.families.shared.section import Section
from mole_jax.model.architecture import DecoderArchitecture, RopeScaling

# transformers' own defaults, for fields that a config.json leaves out.
_ALL = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA = _ALL | {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}
_QWEN = _ALL | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
_QWEN |= {"max_position_embeddings": 32768}
DEFAULTS = {
    "llama": _LLAMA | {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _LLAMA
    | {"intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}
NO_ID = -1
"""`DecoderArchitecture.eos_id` where a config names none and leaves that to generation_config.json."""


def decoder_from_hf(values: Any, top: Section, kind: str = "llama") -> DecoderArchitecture:
    """Reads a ``text_config``.

    Args:
        values: the object, or None.
        top: the whole config.
        kind: the ``model_type`` of one that does not say it.

    Raises:
        UserError: a value is malformed, or of a part that is not supported or not known.
    """
    where = f"{top.where}: text_config"
    values = {} if values is None else values
    kind = Section(values, where).only("model_type", *DEFAULTS, default=kind)
    section = Section(values, where, DEFAULTS[kind])
    section.only("hidden_act", "silu")
    section.only("attention_bias", False)
    section.only("mlp_bias", False)
    if kind.startswith("qwen"):
        section.only("use_sliding_window", False)
    heads = section.integer("num_attention_heads")
    width = section.integer("hidden_size")
    # null stands for "derive it" in all three.
    kv_heads = heads if section.get("num_key_value_heads") is None else section.integer("num_key_value_heads")
    head_dim = width // heads if section.get("head_dim") is None else section.integer("head_dim")
    if heads % kv_heads:
        raise UserError(f"{where}: {heads} heads do not divide among {kv_heads} key/value heads")
    max_position = section.integer("max_position_embeddings")
    if kind == "mistral" and section.get("sliding_window") is not None:
        # Within its window a sliding attention is an ordinary one, so sequences end there.
        max_position = min(max_position, section.integer("sliding_window"))
    theta, scaling = _rope(section)
    first, *others = section.ids("eos_token_id") or [NO_ID]
    pads = section.get("pad_token_id"), top.get("pad_token_id")
    pad = pads[1] if pads[0] is None else pads[0]
    tied = [one.only("tie_word_embeddings", False, True) for one in (section, top)]
    decoder = DecoderArchitecture(
        vocab=section.integer("vocab_size"),
        width=width,
        mlp_width=section.integer("intermediate_size"),
        layers=section.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=section.number("rms_norm_eps", 1e-6),
        tied_head=any(tied),  # transformers ties when either place says so
        bos_id=None if section.get("bos_token_id") is None else section.integer("bos_token_id", least=0),
        eos_id=first,
        other_eos_ids=tuple(others),
        pad_id=0
        if pad is None or pad == -1
        else Section({"pad_token_id": pad}, where).integer("pad_token_id", least=0),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )
    _check_rest(section, kind)
    return decoder


def _check_rest(section: Section, kind: str) -> None:
    layers = section.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or set(map(str, layers)) - {"full_attention"}):
        raise UserError(f"{section.where}: 'layer_types' is {layers!r}, only 'full_attention' is supported")
    # Of Qwen's windows that are switched off.
    section.check_all_read(*(("sliding_window", "max_window_layers") if kind.startswith("qwen") else ()))


def _rope(section: Section) -> tuple[float, RopeScaling | None]:
    """Rotary settings from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    legacy, current = section.get("rope_scaling"), section.get("rope_parameters")
    values, key = (legacy, "rope_scaling") if legacy else (current or {}, "rope_parameters")
    rope = Section(values, f"{section.where}: {key}")
    theta = rope.number("rope_theta", section.get("rope_theta", 10_000.0))
    rope.only("partial_rotary_factor", 1.0, 1)
    kind_key = "rope_type" if "rope_type" in values or "type" not in values else "type"
    if rope.only(kind_key, "default", "llama3") == "default":
        rope.check_all_read("type")
        return theta, None
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.integer(
            "original_max_position_embeddings", section.get("max_position_embeddings", None)
        ),
    )
    rope.check_all_read("type")
    return theta, scaling


def kind_of(decoder: DecoderArchitecture) -> str:
    """Returns the ``model_type`` that computes this decoder. A Mistral is a Llama whose window is its length.

    Raises:
        UserError: none does.
    """
    if decoder.qkv_bias and decoder.qk_norm:
        raise UserError(
            "no decoder of transformers has both biases and norms of queries and keys; it cannot be written"
        )
    return "qwen2" if decoder.qkv_bias else "qwen3" if decoder.qk_norm else "llama"


def decoder_to_hf(decoder: DecoderArchitecture) -> dict[str, Any]:
    """Returns the ``text_config`` with which transformers 5 makes this decoder; raises `UserError` if it cannot."""
    kind = kind_of(decoder)
    config: dict[str, Any] = {
        "bos_token_id": decoder.bos_id,
        "eos_token_id": eos_to_hf(decoder),
        "hidden_act": "silu",
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_width,
        "max_position_embeddings": decoder.max_position,
        "model_type": kind,
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": decoder.layers,
        "num_key_value_heads": decoder.kv_heads,
        "pad_token_id": decoder.pad_id,
        "rms_norm_eps": decoder.norm_eps,
        "rope_parameters": _rope_to_hf(decoder),
        "tie_word_embeddings": decoder.tied_head,
        "vocab_size": decoder.vocab,
    }
    if kind != "qwen2" or decoder.head_dim * decoder.heads != decoder.width:  # Qwen2's config has none of its own
        config["head_dim"] = decoder.head_dim
    if kind == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    else:
        config |= {"sliding_window": None, "use_sliding_window": False}
    if kind == "qwen3":
        config["attention_bias"] = False
    return dict(sorted(config.items()))


def _rope_to_hf(decoder: DecoderArchitecture) -> dict[str, Any]:
    scaling = decoder.rope_scaling
    if scaling is None:
        return {"rope_theta": decoder.rope_theta, "rope_type": "default"}
    return {
        "rope_theta": decoder.rope_theta,
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


def eos_to_hf(decoder: DecoderArchitecture) -> int | list[int]:
    """Returns the ids that end an answer as Hugging Face's files have them: one as a number, several as a list."""
    return list(decoder.eos_ids) if decoder.other_eos_ids else decoder.eos_id


def decoder_rows(decoder: DecoderArchitecture, prefix: str, head: str) -> tuple[Row, ...]:
    """Returns the decoder's table: names begin with `prefix`, and the head, if it is not tied, is called `head`."""
    ours, theirs, bias = "decoder/layers/", prefix + "layers.{layer}.", decoder.qkv_bias
    norms = (
        Row(ours + "attention/q_norm/scale", "C", theirs + "self_attn.q_norm.weight"),
        Row(ours + "attention/k_norm/scale", "C", theirs + "self_attn.k_norm.weight"),
    )
    return (
        Row("decoder/embedding", "V D", prefix + "embed_tokens.weight"),
        *affine(ours + "attention_norm", "D", theirs + "input_layernorm", bias=False),
        *linear(ours + "attention/q_proj", "D HC", theirs + "self_attn.q_proj", bias=bias),
        *linear(ours + "attention/k_proj", "D KC", theirs + "self_attn.k_proj", bias=bias),
        *linear(ours + "attention/v_proj", "D KC", theirs + "self_attn.v_proj", bias=bias),
        *linear(ours + "attention/o_proj", "HC D", theirs + "self_attn.o_proj", bias=False),
        *(norms if decoder.qk_norm else ()),
        *affine(ours + "mlp_norm", "D", theirs + "post_attention_layernorm", bias=False),
        *linear(ours + "mlp/gate_proj", "D F", theirs + "mlp.gate_proj", bias=False),
        *linear(ours + "mlp/up_proj", "D F", theirs + "mlp.up_proj", bias=False),
        *linear(ours + "mlp/down_proj", "F D", theirs + "mlp.down_proj", bias=False),
        *affine("decoder/norm", "D", prefix + "norm", bias=False),
        *(() if decoder.tied_head else (Row("decoder/head/kernel", "D V", head, TRANSPOSE),)),
    )
