"""LightningModules: thin wrappers of the mathematics, the model and its adapters."""
