"""The conversion, top to bottom: calibrate, rope_split, low_rank, layer, refine, export, report; pipeline runs them.

allocate deals a cache budget out over the layers, group is the processes that share the work, and compare sets methods
side by side.
"""

from .compare import Comparison, Variant, compare
from .job import ConversionOptions
from .pipeline import convert, dry_run
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
