"""What follows a cut: blocks refitted in closed form or by gradient descent, and fine-tuning of the whole model."""
