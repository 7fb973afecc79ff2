"""Kernels in C++, compiled for the machine at their first use."""
