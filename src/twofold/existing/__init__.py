"""Half the cache of models that others trained, exactly where the algebra allows it."""

from twofold.existing.halving import HalvingReport, LayerReport, halve, is_halved, restore

__all__ = ["HalvingReport", "LayerReport", "halve", "is_halved", "restore"]
