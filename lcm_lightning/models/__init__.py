"""Stable Diffusion pipelines, their adapters, sampling and export."""
