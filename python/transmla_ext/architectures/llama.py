"""Llama, and those that differ from it in nothing but numbers."""

from .base import Architecture

__all__ = ["Llama"]


class Llama(Architecture):
    model_type = "llama"
    models = "Llama 1/2/3.x, SmolLM, SmolLM2, TinyLlama, Yi"
    attention = "GQA, MQA or MHA; scaled RoPE (llama3, linear, YaRN); biases if attention_bias"
    stock = "yes, without biases"
    reads = ("attention_bias",)
