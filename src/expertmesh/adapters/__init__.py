"""LoRA adapters on disk: read in every layout, merged into their base, written for servers."""
