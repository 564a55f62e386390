"""A grafted model on several ranks: what they share out, what a plan of transformers did, calls made together."""
