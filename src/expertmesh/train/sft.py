"""SFTTrainer: TRL's, with what trainer.py adds. A file of its own, because TRL is an extra and Trainer does without."""

import trl

from expertmesh.train.trainer import Trainer


class SFTTrainer(Trainer, trl.SFTTrainer):
    """TRL's SFTTrainer that stops at a loss or gradient that is not finite and logs the load of the experts.

    All arguments, methods and files are TRL's; what is added is described at `Trainer`.
    """
