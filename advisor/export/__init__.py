"""Makes files that run elsewhere from a trained model; `export_model` is the entry."""

from advisor.export.exporter import TARGETS, export_model

__all__ = ["TARGETS", "export_model"]
