"""What a Bridge with a real Megatron-Core model refuses, and what it leaves as it was."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.mbridge.reference import Model
from tests.mbridge.test_bridge_ranks import read_all, tensor_problems

pytestmark = pytest.mark.slow

MODEL = Model("qwen2", layers=4, hidden=24, ffn=40, heads=8, groups=2, head_dim=3, vocab=37)
TIED = Model("qwen2", layers=4, hidden=24, ffn=40, heads=8, groups=2, head_dim=3, vocab=37, tied=True)
INDEX = "model.safetensors.index.json"


def write(model: Model, folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A checkpoint in two files."""
    folder.mkdir(parents=True)
    fields = model.config(**config)
    fields.pop("head_dim")
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = model.coded(torch.float32) if tensors is None else tensors
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# ---- loading


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.2.self_attn.k_proj.bias"]


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.4.mlp.up_proj.weight"] = torch.zeros(40, 24)


def misshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.mlp.down_proj.weight"] = torch.zeros(40, 24)


def int8(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 24, dtype=torch.int8)


def fp8(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(24).to(torch.float8_e4m3fn)


def truncated(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def file_gone(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").unlink()


def tensor_not_in_its_file(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


WRONG_TENSORS: dict[Callable[[dict[str, torch.Tensor]], None], str] = {
    missing: "missing: model.layers.2.self_attn.k_proj.bias [24]".replace("[24]", "[6]"),
    extra: "extra: model.layers.4.mlp.up_proj.weight [40, 24]",
    misshaped: "shape: model.layers.3.mlp.down_proj.weight is [40, 24], expected [24, 40]",
    int8: "dtype: model.layers.0.mlp.up_proj.weight is I8",
    fp8: "dtype: model.norm.weight is F8_E4M3",
}
WRONG_FILES: dict[Callable[[Path], None], str] = {
    truncated: "model-00002-of-00002.safetensors cannot be read",
    file_gone: "names files that are not there: model-00001-of-00002.safetensors",
    tensor_not_in_its_file: "that their files do not hold",
}


def try_to_load(*, good: str, bad: list[str], topology: dict[str, int]) -> list[tuple[str, str, bool]]:
    """(error, message, whether every bit of the model is as before) of each checkpoint of `bad`."""
    from mbridge import AutoBridge, MBridgeError, init_parallel

    init_parallel(**topology)
    bridge = AutoBridge.from_pretrained(good, dtype=torch.float32)
    chunks = bridge.get_model(good)
    before = {name: tensor.clone() for name, tensor in bridge.local_tensors(chunks).items()}
    outcomes = []
    for path in bad:
        error: Exception | None = None
        try:
            bridge.load_weights(chunks, path)
        except MBridgeError as caught:
            error = caught
        after = bridge.local_tensors(chunks)
        same = all(torch.equal(after[name], tensor) for name, tensor in before.items())
        outcomes.append((type(error).__name__, str(error), same))
    return outcomes


@pytest.mark.parametrize("topology", [{}, {"tp": 2}, {"pp": 2}], ids=["TP1", "TP2", "PP2"])
def test_a_wrong_checkpoint_is_refused_on_every_rank_and_nothing_is_loaded(
    ranks: Any, tmp_path: Path, topology: dict[str, int]
) -> None:
    good = write(MODEL, tmp_path / "good", {name: 0.5 * t for name, t in MODEL.coded(torch.float32).items()})
    bad: list[tuple[Path, str]] = []
    for change, message in WRONG_TENSORS.items():
        tensors = MODEL.coded(torch.float32)
        change(tensors)
        bad.append((write(MODEL, tmp_path / change.__name__, tensors), message))
    for damage, message in WRONG_FILES.items():
        bad.append((write(MODEL, tmp_path / damage.__name__), message))
        damage(bad[-1][0])
    bad.append((tmp_path / "no such folder", "neither a folder nor a hub id"))
    bad.append((tmp_path / "good" / "config.json", "neither a folder nor a hub id"))
    world_size = max(topology.values(), default=1)
    paths = [str(path) for path, _ in bad]
    for outcomes in ranks.run(try_to_load, world_size, good=str(good), bad=paths, topology=topology):
        for (error, text, same), (path, message) in zip(outcomes, bad, strict=True):
            assert error == "CheckpointError", path
            assert message in text
            assert same, path


def load_and_read_back(*, path: str, topology: dict[str, int]) -> list[str]:
    from mbridge import AutoBridge, init_parallel

    init_parallel(**topology)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    chunks = bridge.get_model(path)
    return tensor_problems("export", dict(bridge.export_weights(chunks)), read_all(Path(path)))


@pytest.mark.parametrize("topology", [{}, {"pp": 2}], ids=["PP1", "PP2"])
def test_a_tied_checkpoint_with_a_head_of_its_own_is_exported_with_it(
    ranks: Any, tmp_path: Path, topology: dict[str, int]
) -> None:
    tensors = TIED.coded(torch.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    folder = write(TIED, tmp_path / "tied", tensors)
    world_size = max(topology.values(), default=1)
    results = ranks.run(load_and_read_back, world_size, path=str(folder), topology=topology)
    assert results == [[]] * world_size


def wrong_models(*, path: str) -> dict[str, tuple[str, str]]:
    """What loading says to models that the config does not describe; one rank."""
    from torch import nn

    from mbridge import AutoBridge, MBridgeError, init_parallel

    init_parallel()
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    build = bridge.get_model
    said: dict[str, tuple[str, str]] = {}

    def attempt(what: str, models: Any) -> None:
        try:
            bridge.load_weights(models, path)
        except MBridgeError as error:
            said[what] = (type(error).__name__, str(error))

    chunk = build()[0]
    chunk.decoder.final_layernorm = nn.Identity()
    attempt("no final norm", [chunk])
    chunk = build()[0]
    chunk.decoder.layers[1].self_attention.linear_qkv.bias = None
    attempt("no bias", [chunk])
    chunk = build()[0]
    del chunk.decoder.layers[3]
    attempt("a layer less", [chunk])
    chunk = build()[0]
    chunk.decoder.layers[3].layer_number = 5
    attempt("a layer more", [chunk])
    chunk = build()[0]
    chunk.decoder.layers[3].layer_number = 3
    attempt("a layer twice", [chunk])
    chunk = build()[0]
    chunk.output_layer.weight = nn.Parameter(torch.zeros(1, 24))
    attempt("a value head", [chunk])
    chunk = build()[0]
    chunk.decoder.layers[0].mlp.linear_fc1.weight = nn.Parameter(torch.zeros(24, 80).T)
    attempt("a transposed weight", [chunk])
    attempt("another dtype", [build()[0].bfloat16()])
    attempt("no chunk", [])
    return said


def test_a_model_that_is_not_the_configs_is_refused(ranks: Any, tmp_path: Path) -> None:
    folder = write(MODEL, tmp_path / "good")
    said = ranks.run(wrong_models, 1, path=str(folder))[0]
    expected = {
        "no final norm": "decoder.final_layernorm.weight",
        "no bias": "decoder.layers.1.self_attention.linear_qkv.bias: not in this model",
        "a layer less": "decoder.layers.3.mlp.linear_fc2.weight",
        "a layer more": "'decoder.layers.4.mlp.linear_fc2.weight'",
        "a layer twice": "decoder.layers.2",
        "a value head": "'output_layer.weight' has shape [1, 24] here",
        "a transposed weight": "contiguous",
        "another dtype": "is torch.bfloat16, expected torch.float32",
        "no chunk": "an empty list",
    }
    assert said.keys() == expected.keys()
    for what, text in expected.items():
        assert said[what][0] == "ModelError", what
        assert text in said[what][1]


def build(*, config: dict[str, Any], topology: dict[str, int]) -> str:
    from mbridge import AutoBridge, MBridgeError, init_parallel

    init_parallel(**topology)
    try:
        AutoBridge.from_config(config, dtype=torch.float32).get_model()
    except MBridgeError as error:
        return f"{type(error).__name__}: {error}"
    return "built"


@pytest.mark.parametrize(
    ("sizes", "topology", "named"),
    [
        ({"heads": 6, "groups": 2}, {"tp": 4}, "num_attention_heads=6"),
        ({"ffn": 42}, {"tp": 4}, "ffn_hidden_size=42"),
        ({"heads": 12, "groups": 3}, {"tp": 4}, "num_query_groups=3"),
        ({"layers": 3}, {"pp": 2}, "num_layers=3"),
    ],
)
def test_sizes_that_do_not_divide_are_named_on_every_rank(
    ranks: Any, sizes: dict[str, int], topology: dict[str, int], named: str
) -> None:
    model = Model("llama", **{"layers": 4, **sizes})
    for said in ranks.run(build, max(topology.values()), config=model.config(), topology=topology):
        assert said.startswith("TopologyError")
        assert named in said


# ---- ranks that disagree, or of which one fails: every rank raises, none waits


def disagree(*, configs: list[dict[str, Any]], what: str, topology: dict[str, int], bucket_bytes: list[int]) -> str:
    import torch.distributed as dist

    from mbridge import AutoBridge, MBridgeError, init_parallel

    init_parallel(**topology)
    rank = dist.get_rank()
    bridge = AutoBridge.from_config(configs[rank], dtype=torch.float32, make_vocab_size_divisible_by=1 + rank * 10)
    if what != "padding":
        bridge = AutoBridge.from_config(configs[rank], dtype=torch.float32)
    chunks = bridge.get_model()
    if what == "a broken model" and rank == 1:
        chunks[0].decoder.layers[0].mlp.linear_fc2.weight = None
    if what == "a wrong stage" and rank == 1:
        for layer in chunks[0].decoder.layers:
            layer.layer_number -= 1
    try:
        list(bridge.export_buckets(chunks, bucket_bytes=bucket_bytes[rank]))
    except MBridgeError as error:
        return f"{type(error).__name__}: {error}"
    return "exported"


@pytest.mark.parametrize(
    ("what", "models", "topology", "bucket_bytes", "said"),
    [
        ("a layer more", (MODEL, replace(MODEL, layers=5)), {"tp": 2}, (1000, 1000),
         ("PlanError: ranks disagree on the plan", "model.layers.4.input_layernorm.weight")),
        ("another family", (MODEL, replace(MODEL, family="llama")), {"tp": 2}, (1000, 1000),
         ("PlanError: ranks disagree on the plan", "q_proj.bias")),
        ("bucket sizes", (MODEL, MODEL), {"tp": 2}, (1000, 2000), ("PlanError: ranks disagree", "bucket_bytes=2000")),
        ("padding", (MODEL, MODEL), {"tp": 2}, (1000, 1000), ("PlanError: ranks disagree", "word_embeddings")),
        ("a broken model", (MODEL, MODEL), {"pp": 2}, (1000, 1000), ("", "decoder.layers.2.mlp.linear_fc2.weight")),
        ("a wrong stage", (MODEL, MODEL), {"pp": 2}, (1000, 1000), ("PlanError", "layers.3.mlp.down_proj.weight")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_ranks_with_different_plans_all_raise(
    ranks: Any, what: str, models: tuple[Model, Model], topology: dict[str, int], bucket_bytes: tuple[int, int],
    said: tuple[str, str],
) -> None:  # fmt: skip
    configs = [model.config(head_dim=None) for model in models]
    found = ranks.run(
        disagree, 2, configs=configs, what=what, topology=topology, bucket_bytes=list(bucket_bytes), timeout_s=40.0
    )
    for text in found:
        assert text.startswith(said[0])
        assert said[1] in text
    if what == "a broken model":
        assert [text.split(":")[0] for text in found] == ["PeerError", "ModelError"]
        assert "rank 1 failed" in found[0]


# ---- saving


def save_under_a_limit(
    *, path: str, folder: str, topology: dict[str, int], by_stage: bool, failing_rank: int, max_bytes: int | None
) -> str:
    """Save, where the kernel lets `failing_rank` write no file larger than `max_bytes`."""
    import torch.distributed as dist

    from mbridge import AutoBridge, MBridgeError, init_parallel

    init_parallel(**topology)
    bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
    chunks = bridge.get_model(path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if max_bytes is not None and dist.get_rank() == failing_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limit[1]))
        bridge.save_weights(chunks, folder, distributed_filesystem=by_stage)
    except MBridgeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return "saved"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_failed_save(said: list[str], failing_rank: int, old: dict[str, bytes], folder: Path) -> None:
    for rank, text in enumerate(said):
        kind = "CheckpointError" if rank == failing_rank else f"PeerError: rank {failing_rank} failed"
        assert text.startswith(kind)
        assert "cannot be" in text
    assert contents(folder) == old
    assert sorted(path.name for path in folder.iterdir()) == sorted(old)


@pytest.mark.parametrize(
    ("topology", "by_stage", "failing_rank"),
    [({"tp": 2}, False, 0), ({"pp": 2}, False, 0), ({"pp": 2}, True, 1), ({"pp": 2}, True, 0)],
    ids=["TP2", "PP2", "the second of two writers", "the first of two writers"],
)
def test_a_write_that_fails_leaves_the_old_checkpoint(
    ranks: Any, tmp_path: Path, topology: dict[str, int], by_stage: bool, failing_rank: int
) -> None:
    source = write(MODEL, tmp_path / "new", {name: 0.5 * t for name, t in MODEL.coded(torch.float32).items()})
    folder = write(MODEL, tmp_path / "old")
    old = contents(folder)
    arguments = {"path": str(source), "folder": str(folder), "topology": topology, "by_stage": by_stage}
    said = ranks.run(save_under_a_limit, 2, **arguments, failing_rank=failing_rank, max_bytes=20_000)
    check_failed_save(said, failing_rank, old, folder)
    assert tensor_problems("old", read_all(folder), MODEL.coded(torch.float32)) == []
    said = ranks.run(save_under_a_limit, 2, **arguments, failing_rank=failing_rank, max_bytes=None)
    assert said == ["saved", "saved"]
    assert tensor_problems("new", read_all(folder), read_all(source)) == []


def test_a_disk_that_fills_leaves_the_old_checkpoint(ranks: Any, tmp_path: Path, small_disk: Path) -> None:
    source = write(MODEL, tmp_path / "new")
    folder = write(MODEL, small_disk / "old")
    old = contents(folder)
    (small_disk / "ballast").write_bytes(bytes(400_000 - sum(map(len, old.values())) - 80_000))
    said = ranks.run(
        save_under_a_limit, 2, path=str(source), folder=str(folder), topology={"tp": 2}, by_stage=False,
        failing_rank=0, max_bytes=None,
    )  # fmt: skip
    check_failed_save(said, 0, old, folder)
    assert "No space left on device" in said[0]


def test_a_folder_that_cannot_be_made_is_an_error_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    source = write(MODEL, tmp_path / "new")
    said = ranks.run(
        save_under_a_limit, 2, path=str(source), folder=str(source / "config.json" / "x"), topology={"tp": 2},
        by_stage=False, failing_rank=0, max_bytes=None, timeout_s=40.0,
    )  # fmt: skip
    assert said[0].startswith("CheckpointError")
    assert said[1].startswith("PeerError: rank 0 failed")


SAVE = """
import sys, torch
from mbridge import AutoBridge
bridge = AutoBridge.from_pretrained(sys.argv[1], dtype=torch.float32)
models = bridge.get_model(sys.argv[1])
print("loaded", flush=True)
bridge.save_weights(models, sys.argv[2])
print("saved", flush=True)
"""


def test_a_killed_save_leaves_the_old_checkpoint(tmp_path: Path, repo_root: Path) -> None:
    """SIGKILL as soon as the first file of the new checkpoint appears."""
    model = Model("llama", layers=2, hidden=512, ffn=2048, heads=8, groups=8, head_dim=64, vocab=8000)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.rand(shape, generator=generator) for name, shape in model.hf_shapes().items()}
    source = write(model, tmp_path / "new", tensors)
    folder = write(model, tmp_path / "old", {name: -tensor for name, tensor in tensors.items()})
    old = contents(folder)
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE, source, folder], stdout=subprocess.PIPE, text=True, cwd=repo_root
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "loaded\n"
        deadline = time.monotonic() + 30
        while process.poll() is None and len(list(folder.iterdir())) == len(old) and time.monotonic() < deadline:
            time.sleep(0.0005)
        assert process.returncode is None, "the save ended before it wrote a file"
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=10) == -signal.SIGKILL
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait(timeout=10)
        process.stdout.close()
    left = contents(folder)
    assert {name: left[name] for name in old} == old
    assert set(left) > set(old)  # it was writing
    assert all(name.startswith(".") for name in set(left) - set(old))
    assert tensor_problems("old", load_as_transformers(folder), {name: -t for name, t in tensors.items()}) == []
    finished = subprocess.run([sys.executable, "-c", SAVE, source, folder], check=True, timeout=60, cwd=repo_root)
    assert finished.returncode == 0
    assert tensor_problems("new", load_as_transformers(folder), tensors) == []


def load_as_transformers(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


def single_from(folder: Path) -> None:
    tensors = read_all(folder)
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("old", ["single", "sharded"])
@pytest.mark.parametrize("new", ["single", "sharded"])
def test_a_save_over_any_checkpoint(ranks: Any, tmp_path: Path, old: str, new: str) -> None:
    source = write(MODEL, tmp_path / "new", {name: 0.5 * t for name, t in MODEL.coded(torch.float32).items()})
    folder = write(MODEL, tmp_path / "old")
    for path, kind in ((source, new), (folder, old)):
        if kind == "single":
            single_from(path)
    for _ in range(2):
        said = ranks.run(
            save_under_a_limit, 2, path=str(source), folder=str(folder), topology={"tp": 2}, by_stage=False,
            failing_rank=0, max_bytes=None,
        )  # fmt: skip
        assert said == ["saved", "saved"]
        assert tensor_problems("saved", read_all(folder), read_all(source)) == []
        assert tensor_problems("saved", load_as_transformers(folder), read_all(source)) == []
        assert len(list(folder.glob("*.safetensors"))) == (1 if new == "single" else 2)


def test_a_save_over_its_own_source(ranks: Any, tmp_path: Path) -> None:
    folder = write(MODEL, tmp_path / "own")
    expected, config = read_all(folder), json.loads((folder / "config.json").read_text())
    for _ in range(3):
        said = ranks.run(
            save_under_a_limit, 2, path=str(folder), folder=str(folder), topology={"pp": 2}, by_stage=True,
            failing_rank=0, max_bytes=None,
        )  # fmt: skip
        assert said == ["saved", "saved"]
        assert tensor_problems("saved", read_all(folder), expected) == []
        assert json.loads((folder / "config.json").read_text()) == config


def save_in_other_dtype(*, path: str, folder: str) -> list[str]:
    from mbridge import AutoBridge, init_parallel

    init_parallel()
    bridge = AutoBridge.from_pretrained(path, dtype=torch.bfloat16)
    chunks = bridge.get_model(path)
    assert {tensor.dtype for tensor in bridge.local_tensors(chunks).values()} == {torch.bfloat16}
    bridge.save_weights(chunks, folder)
    shutil.copy(Path(path) / "config.json", Path(folder) / "again.json")
    return sorted({str(tensor.dtype) for _, tensor in bridge.export_weights(chunks)})


def test_dtypes_on_disk_are_the_originals(ranks: Any, tmp_path: Path) -> None:
    """A model in bf16 from a checkpoint in fp32 with one fp16 tensor: exported as it is, saved as it was."""
    tensors = {name: torch.full_like(t, 0.5) for name, t in MODEL.coded(torch.float32).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    source = write(MODEL, tmp_path / "source", tensors)
    assert ranks.run(save_in_other_dtype, 1, path=str(source), folder=str(tmp_path / "saved")) == [["torch.bfloat16"]]
    assert tensor_problems("saved", read_all(tmp_path / "saved"), tensors) == []
    single = load_file(next((tmp_path / "saved").glob("*.safetensors")))
    assert single
