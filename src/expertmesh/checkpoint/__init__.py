"""Checkpoints to resume from: published whole and checked (publish.py), saved and loaded (state.py)."""
