"""The conversion, top to bottom: calibrate, rope_split, low_rank, layer, export, report; pipeline runs them."""

from .pipeline import ConversionOptions, convert, plan
from .report import ConversionPlan, ConversionReport, LayerReport

__all__ = ["ConversionOptions", "ConversionPlan", "ConversionReport", "LayerReport", "convert", "plan"]
