"""``serving/`` of a bundle: what servers and clients need beside the model, all of it from the one manifest.

``export/serving/files`` holds what becomes of each file there: ``NAME.jinja`` is a template, every other file goes as it is.
"""
