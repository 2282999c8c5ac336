"""From what was typed to objects: where configurations lie, what they may compute, checks, instantiation."""
