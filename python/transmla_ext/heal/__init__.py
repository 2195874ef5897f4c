"""Healing: a converted model learns from the original what conversion lost.

pipeline is heal() from top to bottom, training the loss and the Trainer, text what is trained on.
"""

from .pipeline import heal
from .report import HealReport

__all__ = ["HealReport", "heal"]
