"""The errors of this package; ValueError is for a bad argument, RuntimeError for a misused op."""

__all__ = ["CheckpointError", "TransMLAError", "UnsupportedModelError"]


class TransMLAError(Exception):
    """A model or checkpoint that cannot be used; the text says what to do next."""


class UnsupportedModelError(TransMLAError):
    """The architecture, or a feature of it, has no place in the conversion or format asked for."""


class CheckpointError(TransMLAError):
    """Files that are missing, truncated, inconsistent with config.json, or of a kind that is not read."""
