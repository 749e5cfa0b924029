"""Fine-tuning. config.py defines the configuration, run.py runs it, and trainer.py extends Transformers' Trainer."""
