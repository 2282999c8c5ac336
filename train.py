"""Train: ``python train.py experiment=lcm_flickr30k``. See `lcm_lightning.train`."""

from lcm_lightning.train import main

if __name__ == "__main__":
    main()
