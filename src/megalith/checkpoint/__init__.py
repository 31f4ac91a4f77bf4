"""Saving and loading on any layout, and conversion from and to other programs."""
