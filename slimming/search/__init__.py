"""Which tokens go: features, scores, the top-down search, similarity, and counts that meet a budget."""
