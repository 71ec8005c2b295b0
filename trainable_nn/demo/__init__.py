"""The comparison behind `trainable-nn demo`: a small network, its converted copy, and one training loop for both."""
