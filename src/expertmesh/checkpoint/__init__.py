"""Checkpoints: atomic, verified folders (publish.py), saved and loaded by state.py or a Trainer (train/resume.py)."""
