"""A plug-in for vLLM: LoRA on experts and linear maps by this project's kernels, in vLLM's own server and engine.

    pip install moegraft[vllm]
    vllm serve MODEL --enable-lora ...          # nothing else: vLLM finds ``register`` by its entry point

| file | seam of vLLM |
|---|---|
| ``versions`` | which versions are known, what the plug-in reads of the engine's configuration, the switch |
| ``experts`` | the out-of-tree form of the unquantised MoE method; an experts class of the modular kernel |
| ``quantised`` | methods of fp8, int4 and mxfp4 experts, before vLLM repacks their weights |
| ``moe_layers`` | ``FusedMoEWithLoRA`` and ``FusedMoE3DWithLoRA`` over pages |
| ``linear_layers`` | the LoRA layers of linear maps over pages; the operator that compiled graphs call |
| ``manager`` | the manager of adapters: when pages are filled and given back |
| ``adapters`` | what a file means: scales, factors of all experts in one tensor, experts that are absent |
| ``pages`` | no vLLM: adapters in numbered slots over a pool of pages |

``docs/engines.md`` says what is served. Whatever is not keeps vLLM's own path, and one line of the log says why.
"""

from __future__ import annotations


def register() -> None:
    """vLLM calls it in each of its processes before a model is built; a second call does nothing."""
    from vllm.logger import init_logger

    from moegraft.integrations.vllm.versions import wanted_mode, why_not

    logger = init_logger("vllm.moegraft")
    reason = why_not()
    if reason is not None:
        logger.info("moegraft leaves vLLM as it is: %s", reason)
        return
    from moegraft.integrations.vllm import experts, linear_layers, manager, moe_layers, quantised

    experts.install(base_too=wanted_mode() == "all")
    quantised.install()
    moe_layers.install()
    linear_layers.install()
    manager.install()
