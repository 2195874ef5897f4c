"""The conversion, top to bottom: calibrate, rope_split, low_rank, layer, export, report; pipeline runs them.

compare sets their results side by side.
"""

from .compare import Comparison, Variant, compare
from .pipeline import ConversionOptions, convert, dry_run
from .report import ConversionPlan, ConversionReport, LayerReport

__all__ = [
    "Comparison",
    "ConversionOptions",
    "ConversionPlan",
    "ConversionReport",
    "LayerReport",
    "Variant",
    "compare",
    "convert",
    "dry_run",
]
