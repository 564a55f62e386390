"""Device functions that the kernels of several ops share."""
