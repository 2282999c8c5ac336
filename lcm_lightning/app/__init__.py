"""A page in the browser that draws, teacher and students side by side."""
