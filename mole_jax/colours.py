"""Colours that are told apart at a glance: of experts, domains and parts, in figures, pages and on a terminal."""

from __future__ import annotations

PALETTE = ("#2a6fbb", "#e07b39", "#3a9d5d", "#8e5bb5", "#c23b4e", "#7a6a58", "#d4a017", "#4aa8b5")
