"""Linear maps of a few rows with LoRA inside: what a decode step needs of q, k, v and o."""
