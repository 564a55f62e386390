"""Caps on what an untrusted file may ask for, all in one place: each several times what is published today."""

from __future__ import annotations

# JSON, in bytes.
MAX_CONFIG_BYTES = 4 * 2**20  # adapter_config.json, config.json
MAX_GENERATION_CONFIG_BYTES = 2**20
MAX_INDEX_BYTES = 64 * 2**20

# Headers of safetensors. Kimi K2 stores 280,000 tensors in 62 files; their names have at most 80 characters.
MAX_HEADER_BYTES = 64 * 2**20
MAX_TENSORS = 2**19  # of one folder
MAX_ADAPTER_TENSORS = 2**18  # of an adapter whose base is not known
MAX_NAME_CHARS = 512
MAX_ENTRY_BYTES = 768  # of one tensor in a header
LEAST_TENSORS = 20_000  # that an adapter may have, of however small a model
MAX_DIMS = 8
MAX_DIM = 2**31 - 1

# Names in an adapter: what wrappers and PEFT put around the name of a module may make it this much longer.
MAX_NAME_EXTRA = 128
MAX_RENAMED = 256  # names that renames make of one

# Fields of adapter_config.json.
MAX_RANK = 2**16
MAX_TARGET_PARAMETERS = 2**14
MAX_PATTERNS = 2**19  # a rank of its own for each of the largest models' modules
MAX_EXPRESSIONS = 256  # of them, those that are no plain names
MAX_PATTERN_CHARS = 1024
MAX_MATCH_STEPS = 10_000_000  # of all expressions of a config together: some seconds
MAX_TOKEN_ROWS = 1024  # trained rows of an embedding; more are a whole embedding
MAX_COMBINED = 16  # adapters of one row
MAX_COMBINED_WEIGHT = 10**6
MAX_NOTES = 20  # unknown fields that are named

# What is looked up, named and examined of an adapter that is wrong.
MAX_STRAY = 100
MAX_PROBLEMS = 100
MAX_PADDING = 16  # zero rows that pad experts to one rank, as a multiple of the rows that the file holds
MAX_EXAMINED_BYTES = 64 * 2**30  # values that inspection looks at
MAX_BUILT_BYTES = 2**30  # a module that inspection builds, to see whether its values fit

# Sizes in the config of a base checkpoint.
MAX_CONFIG_DEPTH = 16
MAX_EXPERTS = 4096
MAX_LAYERS = 512
MAX_VOCABULARY = 2**22
MAX_SIZE = 2**20  # hidden sizes, heads, and whatever else counts columns
