"""Captioned images: readers of the layouts they come in, shards, and the LightningDataModule that streams them."""
