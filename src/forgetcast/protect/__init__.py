"""What keeps old knowledge while the new is learnt: one idea a file."""
