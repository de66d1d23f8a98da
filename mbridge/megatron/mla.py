"""Multi-latent attention with Megatron-Core's local layers. Imported late: it subclasses a class of megatron."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention


class MlaDotProductAttention(DotProductAttention):
    """`DotProductAttention` for values whose head size differs from that of queries and keys.

    Megatron-Core 0.16 passes `k_channels` and `v_channels` to the core attention of MLA, which only TransformerEngine's
    takes. Can go when the local one takes them too. It has no parameters.
    """

    def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The parent's forward handles any value size; only the width of its output comes from the config. MLA's base
        # class builds a core attention without channels first, and replaces it.
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


def use_local_mla_attention(block: Any) -> None:
    """Put `MlaDotProductAttention` into every layer of a local block spec, in place."""
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = MlaDotProductAttention
