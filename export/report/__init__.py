"""``report.html``: everything that a bundle proves, on one page that needs nothing else."""
