"""Evaluate: ``python evaluate.py run=outputs/...``. See `lcm_lightning.evaluate`."""

from lcm_lightning.evaluate import main

if __name__ == "__main__":
    main()
