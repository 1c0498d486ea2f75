"""Methods of continual learning: one file each, all behind the contract in `base`."""
