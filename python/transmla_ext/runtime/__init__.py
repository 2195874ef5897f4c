"""Fast inference: a paged latent cache, prefill, decode, generation, and an engine that batches requests."""

from .cache import CachedSequence, CacheFullError, PagedLatentCache
from .engine import Engine, EngineStats, Output, QueueFullError, Stream
from .generate import Generation, TokenScores
from .model import MLAModel, load

__all__ = [
    "CacheFullError",
    "CachedSequence",
    "Engine",
    "EngineStats",
    "Generation",
    "MLAModel",
    "Output",
    "PagedLatentCache",
    "QueueFullError",
    "Stream",
    "TokenScores",
    "load",
]
