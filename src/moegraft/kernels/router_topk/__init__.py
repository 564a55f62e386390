"""The experts of each token, and their weights, from the router's logits: one launch."""
