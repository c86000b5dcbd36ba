"""What a found plan is shown by: accuracy on held-out images, and a page to look at."""
