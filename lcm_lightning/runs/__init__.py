"""What a run leaves in its folder, under which name, and how it is found and read again."""
