"""Weights from and for fairseq and Hugging Face."""
