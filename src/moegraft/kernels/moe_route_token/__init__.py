"""Routing and shrink 13 of a single token in one launch."""
