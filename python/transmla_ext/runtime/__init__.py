"""Fast inference: a paged latent cache, prefill, decode and generation."""

from .cache import CachedSequence, CacheFullError, PagedLatentCache
from .generate import Generation
from .model import MLAModel, load

__all__ = ["CacheFullError", "CachedSequence", "Generation", "MLAModel", "PagedLatentCache", "load"]
