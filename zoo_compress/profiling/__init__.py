"""Floor 2, below methods and training: what a model costs on this machine, by measurement."""
