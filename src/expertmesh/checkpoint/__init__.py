"""Checkpoints to resume from: published whole (publish.py), checked (verify.py), saved and loaded (state.py)."""
