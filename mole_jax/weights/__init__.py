"""Foreign checkpoint formats: one file a format, each around a table of names."""
