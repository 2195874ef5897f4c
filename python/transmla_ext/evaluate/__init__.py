"""Judging models: perplexity, lm-evaluation-harness, and several models side by side."""

from .report import Evaluation, Result
from .run import evaluate

__all__ = ["Evaluation", "Result", "evaluate"]
