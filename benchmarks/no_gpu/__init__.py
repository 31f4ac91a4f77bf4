"""Compiling for a GPU where there is none."""
