"""The engine: continuous batching over paged keys and values, every request with its own adapter."""
