"""Hostile and broken graphs, made on the fly: each is a small file that a door must refuse by name, and survive."""
