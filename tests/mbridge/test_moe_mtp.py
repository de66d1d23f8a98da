"""MTP layers of real Megatron-Core models: they are built, loaded, exported and saved. Layout only.

transformers neither writes nor runs them, so the checkpoints are made by hand, position-coded, with and without the
copies of embedding and output layer that released ones carry in each MTP layer.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.mbridge.moe_coded import MODELS
from tests.mbridge.moe_reference import MoeModel, Place
from tests.mbridge.test_bridge_ranks import read_all, tensor_problems
from tests.mbridge.test_moe_ranks import scramble, shard_problems

pytestmark = pytest.mark.slow

MTP: dict[str, MoeModel] = {
    "deepseek_v3": replace(MODELS["deepseek_v3"], hidden=16, num_mtp=1),
    "deepseek_v3 tied": replace(MODELS["deepseek_v3"], hidden=16, num_mtp=2, tied=True),
    "glm4_moe": replace(MODELS["glm4_moe"], hidden=16, num_mtp=1),
}
TOPOLOGIES: dict[str, tuple[int, dict[str, int]]] = {
    "one rank": (1, {}),
    "PP2": (2, {"pp": 2}),
    "TP2 EP2 ETP1": (2, {"tp": 2, "ep": 2, "etp": 1}),
    "TP2 EP2 ETP1 PP2": (4, {"tp": 2, "ep": 2, "etp": 1, "pp": 2}),
}


def write(model: MoeModel, folder: Path, *, with_copies: bool) -> dict[str, torch.Tensor]:
    """The checkpoint; returns the tensors that are no copies."""
    (folder / "config.json").write_text(json.dumps(model.config()))
    tensors = model.coded(torch.float32)
    copies = {}
    for i in range(model.num_mtp if with_copies else 0):
        at = f"model.layers.{model.layers + i}."
        copies[at + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        head = "model.embed_tokens.weight" if model.tied else "lm_head.weight"
        copies[at + "shared_head.head.weight"] = tensors[head].clone()
    save_file({**tensors, **copies}, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def on_rank(*, path: str, name: str, topology: dict[str, int], save_to: str) -> dict[str, Any]:
    from mbridge import AutoBridge, init_parallel
    from mbridge.megatron import read_topology

    init_parallel(**topology)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    chunks = bridge.get_model()
    sizes, at = read_topology()
    scramble(chunks)
    bridge.load_weights(chunks, path)
    place = Place(at.tp, sizes.tp, at.ep, sizes.ep, at.etp, sizes.expert_tp)
    problems = shard_problems(MTP[name], read_all(Path(path)), chunks, place)
    exported = dict(bridge.export_weights(chunks))
    buckets = {n: t.clone() for bucket in bridge.export_buckets(chunks, bucket_bytes=4096) for n, t in bucket.tensors}
    bridge.save_weights(chunks, save_to)
    embeds = "embedding.word_embeddings.weight" in bridge.local_tensors(chunks)
    return {"problems": problems, "exported": exported, "buckets": buckets, "embeds": embeds, "stage": at.pp}


@pytest.mark.parametrize("with_copies", [False, True], ids=["without copies", "with copies"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", MTP)
def test_load_export_and_save(ranks: Any, tmp_path: Path, name: str, topology: str, with_copies: bool) -> None:
    model = MTP[name]
    folder, saved = tmp_path / "hf", tmp_path / "saved"
    folder.mkdir()
    tensors = write(model, folder, with_copies=with_copies)
    world_size, sizes = TOPOLOGIES[topology]
    results = ranks.run(on_rank, world_size, path=str(folder), name=name, topology=sizes, save_to=str(saved))
    assert [problem for result in results for problem in result["problems"]] == []
    for result in results:
        assert tensor_problems("export", {n: result["exported"][n] for n in tensors}, tensors) == []
        assert result["embeds"]  # the last stage too, for its MTP layers
    in_buckets = [n for result in results for n in result["buckets"] if n in tensors]
    assert sorted(in_buckets) == sorted(tensors)
    assert tensor_problems("saved", read_all(saved), read_all(folder)) == []
    assert any(
        "eh_proj" in n for result in results for n in result["buckets"] if result["stage"] == sizes.get("pp", 1) - 1
    )
