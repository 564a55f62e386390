"""What an engine is given beside its model and adapters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of one engine. Bytes are ints, or strings such as ``"20GiB"``.

    kv_memory: of keys and values on the model's device · adapter_memory, max_adapters: what may be resident there at
    once, more may be loaded · page_size: tokens a page of keys and values · max_rows: sequences in one step ·
    chunk_tokens: tokens in one step; longer prompts are computed over several · max_model_len: prompt and new tokens
    of a sequence, None as the model's config says · max_waiting: requests that wait before the next is refused ·
    prefix_cache: whether prompts that begin alike, under the same version of an adapter, share pages ·
    batch_sizes: rows are padded to the next of these (none: not padded on the CPU, chosen by the engine on a GPU) ·
    cuda_graphs: decode steps as CUDA graphs where kernels run the experts · overlap: a decode step begins before the
    tokens of the one before are read, so that the host works while the device runs (None: on a GPU) ·
    batch_invariant: a request gets the same tokens and log-probabilities whatever else runs; every step then has the
    same padded size ·
    latent_cache: whether latent attention (MLA) keeps latents, or the heads made of them; None: latents on the CPU ·
    backend: an experts class by name.
    """

    kv_memory: int | str = "1GiB"
    adapter_memory: int | str = "2GiB"
    max_adapters: int = 64
    page_size: int = 16
    max_rows: int = 128
    chunk_tokens: int = 2048
    max_model_len: int | None = None
    max_waiting: int = 4096
    prefix_cache: bool = True
    batch_sizes: tuple[int, ...] = ()
    cuda_graphs: bool = True
    overlap: bool | None = None
    batch_invariant: bool = False
    latent_cache: bool | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_adapters", "page_size", "max_rows", "chunk_tokens", "max_waiting"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: found {value!r}, expected a whole number from 1 up")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(f"max_model_len: found {self.max_model_len}, expected at least 2")
        if any(size < 1 for size in self.batch_sizes):
            raise ValueError(f"batch_sizes: found {self.batch_sizes}, expected sizes from 1 up")
        if self.max_rows > self.chunk_tokens:
            raise ValueError(
                f"max_rows {self.max_rows} is more than chunk_tokens {self.chunk_tokens}: each row needs a token a step"
            )
