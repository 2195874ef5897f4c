"""What takes the place of a model's modules so that a decode step reads each weight once and does little else.

The weights are plain tensors: nn.Module looks up a Parameter more slowly than a small op takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops

__all__ = ["GatedMLP", "Linear", "RMSNorm", "replace_modules"]


class Linear(nn.Module):
    """An nn.Linear, by ops.linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class GatedMLP(nn.Module):
    """down_proj(act_fn(gate_proj(x)) * up_proj(x)), gate_proj and up_proj in one matrix."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        gate, up = mlp.gate_proj, mlp.up_proj
        self.w_gate_up = torch.cat((gate.weight, up.weight))
        self.b_gate_up = None if gate.bias is None else torch.cat((gate.bias, up.bias))
        self.act_fn = mlp.act_fn
        self.w_down, self.b_down = mlp.down_proj.weight.detach(), mlp.down_proj.bias

    def forward(self, x: Tensor) -> Tensor:
        gate, up = ops.linear(x, self.w_gate_up, self.b_gate_up).chunk(2, dim=-1)
        return ops.linear(self.act_fn(gate).mul_(up), self.w_down, self.b_down)


class RMSNorm(nn.Module):
    """A LlamaRMSNorm, or the same of another family, in one op."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight.detach()
        self.eps = float(norm.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


def replace_modules(module: nn.Module) -> None:
    """Replaces what module has of the above, at any depth; modules that do something else stay."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, Linear(child))
        elif {name for name, _ in child.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            setattr(module, name, GatedMLP(child))
        elif hasattr(child, "variance_epsilon"):  # others call it eps, and multiply by 1 + weight or before they round
            setattr(module, name, RMSNorm(child))
        else:
            replace_modules(child)
