"""Root mean square norms of rows, in one launch."""
