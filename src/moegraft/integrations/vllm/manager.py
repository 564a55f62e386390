"""vLLM's manager of adapters over pages: when pages are filled, and when they are given back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm.lora.worker_manager as worker_manager
from vllm.logger import init_logger
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path

from moegraft.core.errors import AdapterError, AdapterMemoryError
from moegraft.core.memory import format_bytes, parse_bytes
from moegraft.integrations.vllm.adapters import complete_experts, fold_scales, split_fused_experts
from moegraft.integrations.vllm.linear_layers import IdleLogitsProcessorWithLoRA, PagedLinear, Serving
from moegraft.integrations.vllm.moe_layers import PagedExperts, PagedFusedMoEWithLoRA
from moegraft.integrations.vllm.pages import SlotPages
from moegraft.integrations.vllm.versions import (
    finish_mapping,
    prepare_mapping,
    wanted_memory,
    wanted_mode,
    why_not_lora,
)
from moegraft.lora.peft.config import CONFIG_FILE, read_config
from moegraft.lora.targets import ModelTargets

if TYPE_CHECKING:
    from vllm.lora.lora_model import LoRAModel

logger = init_logger("vllm.moegraft")


class PagedLoRAModelManager(LRUCacheLoRAModelManager):
    """One pool of pages for all layers of the model; slots are vLLM's own numbers."""

    pages: SlotPages | None = None

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        self._model_dtype = vllm_config.model_config.dtype
        super().__init__(*args, vllm_config=vllm_config, **kwargs)

    def _create_lora_modules(self) -> None:
        """vLLM's layers, ours among them, then the pages that ours share."""
        reason = why_not_lora(self.lora_config, self._model_dtype)
        if reason is None and not self._is_moe and wanted_mode() != "all":
            reason = "the model has no experts"
        Serving.linears = reason is None
        try:
            super()._create_lora_modules()
        finally:
            Serving.linears = False
        if reason is not None:
            logger.info("moegraft leaves LoRA to vLLM: %s", reason)
            return
        experts, linears = self._paged(PagedExperts), self._paged(PagedLinear)
        if self._is_moe and not experts:
            logger.info(
                "moegraft serves linear maps only: the experts' weights are quantised or have kernels of vLLM's"
            )
        if experts or linears:
            self._make_pages(experts, linears)

    def _paged(self, kind: type) -> dict[str, Any]:
        return {name: module for name, module in self.modules.items() if isinstance(module, kind)}

    def _make_pages(self, experts: dict[str, Any], linears: dict[str, Any]) -> None:
        self._layers: dict[str, Any] = experts | linears
        self._touched: dict[int, frozenset[str]] = {}
        layers = self._layers
        memory = wanted_memory()
        self.pages = SlotPages(
            ModelTargets(
                model_type="vllm",
                experts={name: layer.target(name) for name, layer in experts.items()},
                linears={name: layer.target(name) for name, layer in linears.items()},
            ),
            {name: layer.largest() for name, layer in layers.items()},
            num_slots=self.lora_slots,
            dtype=self.lora_config.lora_dtype,
            device=self.device,
            capacity_bytes=None if memory is None else parse_bytes(memory),
        )
        for name, layer in experts.items():
            layer.bind(self.pages.tables.experts[name])
        for name, layer in linears.items():
            layer.bind(self.pages.tables.linears[name])
        for wrapper in {id(layer.punica_wrapper): layer.punica_wrapper for layer in layers.values()}.values():
            prepare_mapping(wrapper)
        dense = sum(layer.dense_bytes() for layer in layers.values())
        logger.info(
            "moegraft serves LoRA of %d experts layers and %d linear maps: %s of pages in place of %s of buffers",
            len(experts), len(linears), format_bytes(self.pages.pool.capacity_bytes), format_bytes(dense),
        )  # fmt: skip

    def activate_adapter(self, lora_id: int) -> bool:
        """vLLM's, and then the pages of the slot: other adapters leave, the longest unused first, where they must.

        Raises AdapterMemoryError where the adapter finds no room even so; it is not active then.
        """
        pages = self.pages
        if pages is None or lora_id in self._active_adapters:
            return bool(super().activate_adapter(lora_id))
        result = bool(super().activate_adapter(lora_id))
        slot = self.lora_index_to_id.index(lora_id)
        parts = {}
        for name, layer in self._layers.items():
            if layer.parts:
                parts[name] = layer.parts
            layer.parts = ()
        try:
            self._make_room(pages.pages_of(parts), lora_id)
            pages.put(slot, parts)
        except AdapterError:
            self.deactivate_adapter(lora_id)
            raise
        self._set_touched(slot, parts)
        logger.debug("adapter %d takes %d of %d pages", lora_id, pages.held(slot), pages.pool.num_pages)
        return result

    def _set_touched(self, slot: int, names: Iterable[str]) -> None:
        """Tells each layer whether an adapter of some slot touches it."""
        self._touched[slot] = frozenset(names)
        touched = frozenset().union(*self._touched.values())
        for name, layer in self._layers.items():
            layer.idle.fill_(name not in touched)

    def _make_room(self, num_pages: int, lora_id: int) -> None:
        assert self.pages is not None
        while self.pages.pool.num_free < num_pages:
            others = [other for other in self._active_adapters.order if other != lora_id]
            if not others:
                raise AdapterMemoryError(
                    f"adapter {lora_id} takes {num_pages} pages of {format_bytes(self.pages.pool.page_bytes)}, "
                    f"{self.pages.pool.num_free} of {self.pages.pool.num_pages} are free"
                )
            self.deactivate_adapter(others[0])

    def _deactivate_adapter(self, lora_id: int) -> None:
        slot = self.lora_index_to_id.index(lora_id) if lora_id in self.lora_index_to_id else None
        super()._deactivate_adapter(lora_id)
        if slot is not None:
            self._empty(slot)

    def _empty(self, slot: int) -> None:
        for head in self._paged(IdleLogitsProcessorWithLoRA).values():
            head.release(slot)
        if self.pages is not None:
            self.pages.drop(slot)
            self._set_touched(slot, ())

    def remove_all_adapters(self) -> None:
        """vLLM's, and all pages are free."""
        super().remove_all_adapters()
        for slot in range(self.lora_slots):
            self._empty(slot)

    def _set_adapter_mapping(self, mapping: Any) -> None:
        super()._set_adapter_mapping(mapping)
        if self.pages is not None:
            num_rows = len(mapping.index_mapping)
            Serving.set_batch(num_rows, len(mapping.prompt_mapping))
            for wrapper in self.punica_wrapper_mapping.values():
                finish_mapping(wrapper, num_rows)

    def _validate_moe_lora_format(self, lora_model: LoRAModel) -> None:
        """vLLM 0.33's: it refuses factors of all experts in one tensor, which ``split_fused_experts`` reads."""
        ours = self._paged(PagedFusedMoEWithLoRA).values()
        if not ours or any(layer.enable_moe_shared_loras for layer in ours):
            super()._validate_moe_lora_format(lora_model)

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        config = getattr(lora_model, "peft_config", None)
        if config is not None:
            for name, layer in self._paged(PagedExperts).items():
                split_fused_experts(lora_model.loras, name, self.packed_modules.get(name, []), layer, config)
        for name, layer in self._paged(PagedFusedMoEWithLoRA).items():
            if name in self.packed_modules and not layer.enable_moe_shared_loras:
                names = self._restrict_to_local_experts(name, self.packed_modules[name])
                complete_experts(lora_model.loras, names, layer)
        super()._create_merged_loras_inplace(lora_model)


def install() -> None:
    """Both managers of vLLM's workers make ours; what they load means what PEFT says."""
    workers = (worker_manager.WorkerLoRAManager, worker_manager.LRUCacheWorkerLoRAManager)
    if workers[1]._manager_cls is PagedLoRAModelManager:
        return
    workers[1]._manager_cls = PagedLoRAModelManager
    theirs = workers[0]._load_adapter

    def _load_adapter(self: Any, lora_request: Any) -> LoRAModel:
        lora = theirs(self, lora_request)
        manager = self._adapter_manager
        if isinstance(manager, PagedLoRAModelManager) and manager.pages is not None:
            file = Path(get_adapter_absolute_path(lora_request.lora_path)) / CONFIG_FILE
            if file.is_file():
                try:
                    config = read_config(file.read_bytes())
                except AdapterError as error:
                    raise ValueError(f"adapter {lora_request.lora_name}: {error}") from error
                fold_scales(lora, config, self.lora_config.max_lora_rank)
                lora.peft_config = config
        return lora

    workers[0]._load_adapter = _load_adapter
