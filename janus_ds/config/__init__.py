"""Configuration: what is trained (recipes), how it is executed (DeepSpeed JSON), and their checks."""
