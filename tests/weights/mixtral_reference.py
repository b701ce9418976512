"""The decoder of a LLaVA over Mixtral by its definition, in float64 numpy, from the tensors of an exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def decoder_logits(folder: Path, x: np.ndarray) -> np.ndarray:
    """Returns the logits (S, V) of the embedded row x (S, D), with the image features in their places."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    assert text["model_type"] == "mixtral"
    tensors = {name: value.astype(np.float64) for name, value in load_file(folder / "model.safetensors").items()}
    x = x.astype(np.float64)
    for layer in range(text["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}."
        w = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        x = x + _attention(_norm(x, w["input_layernorm.weight"], text), w, text)
        x = x + _experts(_norm(x, w["post_attention_layernorm.weight"], text), w, text)
    return _norm(x, tensors["language_model.model.norm.weight"], text) @ tensors["language_model.lm_head.weight"].T


def _norm(x, weight, text):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + text["rms_norm_eps"]) * weight


def _softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def _rotate(x, theta):
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] / theta ** (np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], axis=-1
    )


def _attention(x, w, text):
    heads, kv, dim = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
    q, k, v = ((x @ w[f"self_attn.{name}_proj.weight"].T).reshape(len(x), -1, dim) for name in "qkv")
    theta = text["rope_parameters"]["rope_theta"]
    q, k = _rotate(q, theta), _rotate(k, theta)
    k, v = (np.repeat(one, heads // kv, axis=1) for one in (k, v))
    scores = np.einsum("shc,thc->hst", q, k) / np.sqrt(dim)
    scores = np.where(np.tril(np.ones((len(x), len(x)), bool)), scores, -np.inf)
    return np.einsum("hst,thc->shc", _softmax(scores), v).reshape(len(x), -1) @ w["self_attn.o_proj.weight"].T


def _experts(x, w, text):
    probabilities = _softmax(x @ w["block_sparse_moe.gate.weight"].T)
    assert probabilities.shape[-1] == text["num_local_experts"]
    chosen = np.argsort(-probabilities, axis=-1)[:, : text["num_experts_per_tok"]]
    weights = np.take_along_axis(probabilities, chosen, axis=-1)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    y = np.zeros_like(x)
    for token, experts in enumerate(chosen):
        for expert, weight in zip(experts, weights[token], strict=True):
            w1, w2, w3 = (w[f"block_sparse_moe.experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
            gate = w1 @ x[token]
            y[token] += weight * (w2 @ (gate / (1 + np.exp(-gate)) * (w3 @ x[token])))
    return y
