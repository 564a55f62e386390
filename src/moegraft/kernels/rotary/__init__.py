"""Rotary position embeddings of queries and keys, in one launch."""
