"""What a run is shown to others by: its model card, and its repository on the Hugging Face hub."""
