"""The mathematics of diffusion and consistency models as functions on tensors. Knows nothing of networks."""
