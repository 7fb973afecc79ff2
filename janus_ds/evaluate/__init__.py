"""Decoding and scoring a split with a run, speed, distillation."""
