"""`python -m lcm_lightning.prepare`: captioned images to shards, and shards to what a model's encoders make of them."""
