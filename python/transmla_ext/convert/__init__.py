"""The conversion, top to bottom: calibrate, rope_split, low_rank, layer, export, report; pipeline runs them."""

from .pipeline import ConversionOptions, convert, dry_run
from .report import ConversionPlan, ConversionReport, LayerReport

__all__ = ["ConversionOptions", "ConversionPlan", "ConversionReport", "LayerReport", "convert", "dry_run"]
