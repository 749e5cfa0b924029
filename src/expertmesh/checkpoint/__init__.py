"""Checkpoints: published whole and checked (publish.py), saved and loaded (state.py; by a Trainer: train/resume.py)."""
