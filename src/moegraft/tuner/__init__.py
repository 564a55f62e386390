"""The search for tiles on a GPU: what is tried, the stopwatch, and kernels compiled side by side. `moegraft tune`."""
