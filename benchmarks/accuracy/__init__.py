"""Accuracy at equal cost: ours, score by score, against ToMe and EViT, on digits and on CIFAR-10."""
