"""Methods: each chooses widths (or masks, exits, …) of a model with a layout; the executor is `surgery`."""
