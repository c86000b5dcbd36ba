"""Images to calibrate and evaluate on: ``digits``, or whatever timm's readers open."""

from slimming.data.source import ImageSet, calibration_set, evaluation_set, fingerprint_of, load_tensors

__all__ = ["ImageSet", "calibration_set", "evaluation_set", "fingerprint_of", "load_tensors"]
