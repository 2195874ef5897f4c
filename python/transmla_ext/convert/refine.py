"""Refinement: converted layers learn to lead to the original's hidden states from the converted model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import group
from .calibrate import LayerInputs

__all__ = ["STEP_TOKENS", "HiddenStates", "hidden_state_error", "refine"]

HiddenStates = tuple[Tensor, Tensor]  # the converted model's before some layers, the original's behind them

# Adam's step as a fraction of the root mean square of what it trains, and the tokens that it sees. Excess nats on text
# of the same kind (of another) of SmolLM2-135M at -87.5 %, layers 0 to 8. 400 steps of each layer alone: 0.092 (0.318);
# of its attention alone, for the original's attention output, 0.119 (0.385); those and then 200 steps of three layers
# together 0.079 (0.310), of all nine 0.067 (0.306). Nine together from the closed form, 250 steps: 0.094 (0.343), at
# 0.01 0.098 (0.380). At -68.75 %, layers 0 to 4, each alone for its attention output, 82k tokens in all, 2048, 1024 and
# 512 tokens a step: 0.052 (0.079), 0.045 (0.071), 0.041 (0.069).
_LEARNING_RATE = 0.005
_LEARNING_RATE_TOGETHER = 0.0025  # of layers that were refined alone
STEP_TOKENS = 512
_CHECKS = 5  # of the held-out error; the best weights seen are kept, and two checks without progress end the run


def hidden_state_error(converted: Sequence[Tensor], original: Sequence[Tensor]) -> float:
    """Mean square of RMSNorm(converted) - RMSNorm(original), of hidden states [..., hidden_size]; at most 4."""
    errors = [_errors(hidden, wanted).flatten() for hidden, wanted in zip(converted, original, strict=True)]
    return float(torch.cat(errors).double().mean())


def refine(
    layers: Sequence[nn.Module],
    train: Sequence[HiddenStates],
    held_out: Sequence[HiddenStates],
    inputs: Sequence[LayerInputs],
    *,
    steps: int,
    seed: int,
    on_step: Callable[[], object] = lambda: None,
) -> None:
    """Trains the attention of successive decoder layers, in place, on hidden_state_error(); Adam, cosine to zero.

    What comes in is the converted model's and what should come out the original's, so that layers correct what those
    before them did. Hidden states count as the norm of their reader lets them through: tokens whose hidden state is a
    hundred times as large as all others, the first one above all, weigh as much as those. The same seed on the same
    machine gives the same weights. Processes add up their gradients: each has every group.size()-th sequence.

    Args:
        layers: decoder layers that follow each other; their self_attn is trained.
        train: batches [batch_size, sequence_length, hidden_size]; a step draws 512 tokens of them.
        held_out: as many batches as it takes to see overfitting; the weights with the least error here are kept.
        inputs: of each layer, besides the hidden states.
    """
    rows = [row for before, behind in train for row in zip(before, behind, strict=True)]
    total = torch.tensor(len(rows))
    group.add_up_(total)
    num_rows = int(total)
    batch_size = min(num_rows, max(1, STEP_TOKENS // len(rows[0][0])))
    generator = torch.Generator().manual_seed(seed)
    attentions = nn.ModuleList(layer.get_submodule("self_attn") for layer in layers)
    attentions.requires_grad_(True)
    parameters = list(attentions.parameters())
    rate = _LEARNING_RATE if len(layers) == 1 else _LEARNING_RATE_TOGETHER
    rates = [{"params": [p], "lr": rate * p.detach().square().mean().sqrt().item()} for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.Adam(rates, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def held_out_error() -> float:
        with torch.inference_mode():
            return hidden_state_error([_run(layers, x, inputs) for x, _ in held_out], [y for _, y in held_out])

    best = group.from_first(held_out_error)
    weights = copy.deepcopy(attentions.state_dict())
    checks = {steps * check // _CHECKS for check in range(1, _CHECKS + 1)}
    order: list[int] = []
    missed = 0
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = torch.randperm(num_rows, generator=generator).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        own = [rows[i // group.size()] for i in chosen if i % group.size() == group.rank()]
        optimizer.zero_grad(set_to_none=False)
        if own:
            x, y = (torch.stack(part) for part in zip(*own, strict=True))
            (_errors(_run(layers, x, inputs), y).mean(dim=1).sum() / batch_size).backward()
        group.add_up_(*(p.grad for p in parameters))
        optimizer.step()
        schedule.step()
        on_step()
        if step in checks:
            error = group.from_first(held_out_error)
            missed = 0 if error < best else missed + 1
            if error < best:
                best, weights = error, copy.deepcopy(attentions.state_dict())
            if missed == 2:
                break
    attentions.load_state_dict(group.from_first(lambda: weights))
    attentions.requires_grad_(False)


def _run(layers: Sequence[nn.Module], hidden: Tensor, inputs: Sequence[LayerInputs]) -> Tensor:
    for layer, its_inputs in zip(layers, inputs, strict=True):
        hidden = layer(hidden, **its_inputs)
    return hidden


def _errors(hidden: Tensor, wanted: Tensor) -> Tensor:
    """[batch_size, sequence_length], of hidden states [batch_size, sequence_length, hidden_size]."""
    difference = F.rms_norm(hidden, hidden.shape[-1:]) - F.rms_norm(wanted, wanted.shape[-1:])
    return difference.square().mean(dim=2)
