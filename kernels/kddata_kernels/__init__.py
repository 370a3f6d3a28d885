"""Triton kernels of kddata: torch and triton only."""
