"""How tokens are taken out of a block's graph: rows, merges, layouts."""
