"""What rank 0 shows of a run: on the screen and in Weights & Biases."""
