"""Weights: opened from any format, placed on the mesh, written in any format (one file each in `formats`)."""
