"""The embedded pipeline: its architectures, and how it was trained from scratch."""
