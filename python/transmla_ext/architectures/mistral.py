"""Mistral: Llama, some versions with a sliding window."""

from .base import Architecture

__all__ = ["Mistral"]


class Mistral(Architecture):
    model_type = "mistral"
    models = "Mistral 7B, Nemo, Small"
    attention = "sliding window (v0.1)"
    stock = "yes, without a window"
    reads = ("sliding_window",)
