"""LoRA adapters on disk: read in all known layouts, merged into the base model, and written for inference servers."""
