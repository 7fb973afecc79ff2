"""Decoding with a trained model: key-value cache, rows of a step, CPU kernels, inference set-up."""
