"""Programs that are not ours read our files."""
