"""Hostile and broken graphs and bundles, made on the fly: each is one that a command must refuse by name, and survive."""
