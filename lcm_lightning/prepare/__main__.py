"""Entry point of ``python -m lcm_lightning.prepare``."""

from lcm_lightning.prepare.commands import main

if __name__ == "__main__":
    main()
