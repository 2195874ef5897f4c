"""A model to judge: on this package's kernels if it has latent attention, in transformers if not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from ..checkpoint import file_identity, load_transformers
from ..errors import CheckpointError
from ..models import base_model_type
from ..runtime import MLAModel, load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Subject", "perplexity"]

_BATCH_TOKENS = 4096


class Subject:
    """A local model whose config and tokenizer are read, and whose weights are not yet.

    Raises:
        CheckpointError: no model, or none that is read here; no code of it is run.
    """

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.path = path = Path(path)
        if path.suffix == ".gguf" and path.is_file():
            files = [path]
            source: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        elif (path / "config.json").is_file():
            files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
            if len(files) == 1:
                raise CheckpointError(f"{path} has no safetensors files; pickles are not read")
            source = {"pretrained_model_name_or_path": path}
        else:
            raise CheckpointError(f"{path} is no directory with a config.json and no GGUF file; give a local model")
        try:
            self.config = AutoConfig.from_pretrained(**source, local_files_only=True, trust_remote_code=False)
            self.tokenizer = AutoTokenizer.from_pretrained(**source, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises nearly anything here
            raise CheckpointError(f"{path}: configuration or tokenizer cannot be read: {error}") from error

        self.identity = [file_identity(file) for file in files]

    @property
    def has_latent_attention(self) -> bool:
        model_type = self.config.model_type
        return model_type in ("deepseek_v2", "deepseek_v3") or base_model_type(model_type) is not None

    def load(self, *, dtype: str | None, device: str) -> MLAModel | PreTrainedModel:
        if self.has_latent_attention:
            return load(self.path, dtype=dtype, device=device)
        model: Any = load_transformers(self.path, dtype)
        return model.to(device).eval().requires_grad_(False)  # type: ignore[no-any-return]


def perplexity(model: MLAModel | PreTrainedModel, sequences: Tensor, *, progress: bool) -> float:
    """exp of the mean negative log-likelihood of every token but each sequence's first.

    Args:
        sequences: token ids [num_sequences, sequence_length], int64.
    """
    nats = 0.0
    batches = sequences.split(max(1, _BATCH_TOKENS // sequences.shape[1]))
    for batch in track(batches, "Perplexity", disable=not progress, transient=True):
        if isinstance(model, MLAModel):
            rows = batch.tolist()
            scores = model.score([row[:1] for row in rows], [[row[1:]] for row in rows])
            nats -= sum(float(its.logprobs.sum(dtype=torch.float64)) for [its] in scores)
        else:
            with torch.inference_mode():
                for row in batch.to(model.device):  # one by one: the logits of a batch can be larger than the model
                    logits = model(row.unsqueeze(0)).logits[0, :-1].float()
                    nats += float(F.cross_entropy(logits, row[1:], reduction="sum"))
    return math.exp(nats / sequences[:, 1:].numel())
