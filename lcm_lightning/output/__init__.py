"""What reaches the disk and the screen: whole files, pictures, progress bars."""
