"""Entry point of ``python -m lcm_lightning.app``."""

from lcm_lightning.app.command import main

if __name__ == "__main__":
    main()
