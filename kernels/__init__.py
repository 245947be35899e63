"""Triton kernels beside their torch references, one operation per file. Needs torch alone; Triton where it is."""
