"""What was trained, in the files that other programs open."""
