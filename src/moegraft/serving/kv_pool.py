"""The tensors that pages are made of, one pair a layer, sized by what the model really asks of its cache.

Shape letters: T rows of a step (tokens) · S tokens of a page · P pages · Hq, Hk heads of queries, of keys ·
C head size · L tokens of a context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moegraft.core.errors import UnsupportedModelError
from moegraft.kernels.paged_prefill import LARGEST_HEAD, block_tokens
from moegraft.serving.attention import IMPLEMENTATION, AttentionOptions


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What one attention layer keeps of a token. window: see AttentionOptions · is_latent: one head of keys, latent and
    rotated part in a row, and no values."""

    q_heads: int
    kv_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    window: int | None = None
    is_latent: bool = False

    @property
    def prefill_block(self) -> int | None:
        """Tokens of a program of the prefill kernel; None where it does not serve the layer."""
        widest = max(self.key_size, self.value_size)
        if self.is_latent or widest > LARGEST_HEAD:
            return None
        return block_tokens(self.q_heads // self.kv_heads, widest, self.dtype.itemsize)

    @property
    def bytes_per_token(self) -> int:
        return self.kv_heads * (self.key_size + self.value_size) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class LayerKV:
    """Keys [P, S, Hk, C] and values [P, S, Hk, Cv] of one layer; of latents keys alone, [P, S, 1, R + P]."""

    keys: torch.Tensor
    values: torch.Tensor
    has_kernel: bool = False

    def write(self, slots_T: torch.Tensor, k_THC: torch.Tensor, v_THC: torch.Tensor) -> None:
        """Row t goes to slot ``slots_T[t]``, page * S + offset."""
        if self.has_kernel:
            from moegraft.kernels.paged_decode.host import write_pages  # needs Triton

            write_pages(self.keys, self.values, k_THC, v_THC, slots_T)
            return
        self.keys.flatten(0, 1).index_copy_(0, slots_T, k_THC)
        self.values.flatten(0, 1).index_copy_(0, slots_T, v_THC)

    def gather(self, pages: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first tokens of a sequence's pages."""
        return self.keys[pages].flatten(0, 1)[:count], self.values[pages].flatten(0, 1)[:count]

    def write_latents(self, slots_T: torch.Tensor, k_T1C: torch.Tensor) -> None:
        self.keys.flatten(0, 1).index_copy_(0, slots_T, k_T1C)


class KVPool:
    """All layers' pages, by ``layer_idx``."""

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        *,
        num_pages: int,
        page_size: int,
        device: torch.device,
        has_kernel: bool = False,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.device = device
        blocks = {shape.prefill_block for shape in shapes.values()}
        self.prefill_blocks = sorted(block for block in blocks if block is not None)
        self.prefills_all = None not in blocks
        self.layers: dict[int, LayerKV] = {}
        for layer, shape in shapes.items():
            rows = (num_pages, page_size, shape.kv_heads)
            self.layers[layer] = LayerKV(
                keys=torch.zeros(*rows, shape.key_size, dtype=shape.dtype, device=device),
                values=torch.zeros(*rows, shape.value_size, dtype=shape.dtype, device=device),
                has_kernel=has_kernel,
            )


class _Recorder:
    """Stands for a step while the model is asked what its attention layers are given."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        if layer in self.shapes:
            raise UnsupportedModelError(f"attention layer {layer} runs twice in one forward pass")
        (_, heads, _, size), value_size, is_latent = key.shape, value.shape[-1], options.latents is not None
        if options.latents is not None:
            size, value_size = size + value_size, 0
        self.shapes[layer] = LayerShape(
            q_heads=query.shape[1],
            kv_heads=heads,
            key_size=size,
            value_size=value_size,
            dtype=key.dtype,
            window=options.window,
            is_latent=is_latent,
        )
        width = value.shape[-1] if options.latents is None else options.latents.value_size
        return value.new_zeros(query.shape[0], query.shape[1], width)


@torch.no_grad()
def layer_shapes(model: PreTrainedModel, device: torch.device) -> dict[int, LayerShape]:
    """What every attention layer keeps, by running one token. The model's attention is ours already."""
    assert model.config._attn_implementation == IMPLEMENTATION
    recorder = _Recorder()
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    model(input_ids=zero, position_ids=zero, use_cache=False, paged=recorder)
    if not recorder.shapes:
        raise UnsupportedModelError(f"{type(model).__name__} has no attention that transformers' interface reaches")
    return recorder.shapes


def bytes_per_page(shapes: Mapping[int, LayerShape], page_size: int) -> int:
    """Bytes of all layers together."""
    return page_size * sum(shape.bytes_per_token for shape in shapes.values())
