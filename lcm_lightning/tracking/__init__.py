"""Homes of runs beside their folders: W&B and MLflow."""
