"""Small trainable parts in frozen transformers, and the activation spaces in which their updates act."""
