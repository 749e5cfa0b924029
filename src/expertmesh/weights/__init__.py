"""A model's weights as its Hugging Face checkpoint names them: read in place, written by every rank."""
