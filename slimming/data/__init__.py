"""Images to calibrate and evaluate on: ``digits``, or whatever timm's readers open."""
