"""Fine-tuning: config.py says what, run.py does it, trainer.py is transformers' and TRL's Trainer; guarded."""
