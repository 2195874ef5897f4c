"""What perplexity hides: does a model still copy what it read long ago?"""

from __future__ import annotations

import torch
from torch import Tensor

from .calibrate import Predictions

__all__ = ["RECALL_STRING", "recall_tokens", "recalled"]

RECALL_STRING = 64  # tokens
_CUE = 8  # of those, before the model is asked


def recall_tokens(text: Tensor, distance: int, num_sequences: int) -> Tensor:
    """Random strings, each repeated `distance` tokens of other text after it began: [num_sequences, distance + 64].

    Args:
        text: [num_texts, sequence_length], int64; the strings are random choices of its tokens, the filler is the text.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = text.flatten()
    filler = tokens.repeat(-(-distance * num_sequences // len(tokens)))[: distance * num_sequences]
    sequences = filler.view(num_sequences, distance).clone()
    chosen = torch.randint(len(tokens), (num_sequences, RECALL_STRING), generator=generator)
    sequences[:, :RECALL_STRING] = tokens[chosen]
    return torch.cat([sequences, sequences[:, :RECALL_STRING]], dim=1)


def recalled(predictions: Predictions, tokens: Tensor) -> float:
    """Fraction of the repeated strings' tokens, after a cue of 8, that are predicted."""
    asked = RECALL_STRING - _CUE
    return float((predictions.likeliest[:, -asked:] == tokens[:, -asked:]).float().mean())
