"""Names (`jax.ad_checkpoint.checkpoint_name`) of what a layer's backward pass may keep instead of computing again."""

ATTENTION = "attention"
"""Attention's output and the logarithms of its softmaxes' denominators: its backward pass needs no forward pass."""

QUERIES_KEYS_VALUES = "queries_keys_values"
"""Queries and keys after rotation, and values."""

PROJECTED = "projected"
"""Outputs of the output, gate and up projections."""
