"""Masks by the span laws, and batches made of masked samples."""
