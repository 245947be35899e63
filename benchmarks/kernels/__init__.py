"""The kernels beside the algorithms they replace."""
