"""How outputs move when the trainable parameters move: features, their second moments, spectra."""
