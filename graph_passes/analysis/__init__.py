"""What a graph is, found by following its tokens: axes, layers, blocks, MACs."""
