"""Weights in Hugging Face's checkpoint format: loaded into an existing model in place, and written by all ranks."""
