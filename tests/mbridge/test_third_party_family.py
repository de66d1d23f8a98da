"""A family from outside the package, found by its entry point: the one that README.md shows, in a subprocess."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
RENAMED = {"mlp.gate_proj": "ffn.w1", "mlp.up_proj": "ffn.w3", "mlp.down_proj": "ffn.w2"}
SIZES = {
    "vocab_size": 67, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 50000.0, "rms_norm_eps": 1e-5,
}  # fmt: skip


def source() -> str:
    """The Python file in the README's section on adding a family."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Add a family in one file\n")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None, "README.md has no section 'Add a family in one file' with a Python file in it"
    return found[1]


def install(folder: Path, text: str) -> Path:
    """A package whose module is `text`, with the entry point that a wheel would have, as an installer lays them out."""
    (folder / "my_package").mkdir(parents=True)
    (folder / "my_package" / "__init__.py").touch()
    (folder / "my_package" / "toy.py").write_text(text)
    info = folder / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mbridge.families]\ntoy = my_package.toy:FAMILY\n")
    return folder


def make_checkpoint(folder: Path) -> torch.Tensor:
    """A Qwen2 under Toy's names; returns transformers' logits for tokens 0 to 19."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    tensors = {}
    for name, tensor in model.state_dict().items():
        for theirs, toys in RENAMED.items():
            name = name.replace(theirs, toys)
        tensors[name] = tensor.clone()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "dtype": "float32", **SIZES}))
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(20)[None]).logits
    return logits


def run(code: list[str], site: Path | None, status: int = 0) -> str:
    path = os.pathsep.join([str(ROOT), *([] if site is None else [str(site)])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


LIST = "from mbridge import AutoBridge; print(AutoBridge.list_supported_models())"
ROUND_TRIP = """
import sys, torch
from safetensors.torch import save_file
from mbridge import AutoBridge
path, out = sys.argv[1:]
bridge = AutoBridge.from_pretrained(path, dtype=torch.float32)
models = bridge.get_model(weight_path=path)
save_file(dict(bridge.export_weights(models)), out + "/exported.safetensors")
bridge.save_weights(models, out + "/saved")
tokens = torch.arange(20)[None]
mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).triu(1)
with torch.no_grad():
    logits = models[0].eval()(tokens, tokens, mask)
save_file({"logits": logits.contiguous()}, out + "/logits.safetensors")
"""


def test_the_entry_point_lists_it(tmp_path: Path) -> None:
    site = install(tmp_path / "site", source())
    assert "'toy'" in run(["-c", LIST], site)
    assert "'toy'" not in run(["-c", LIST], None)


@pytest.mark.slow
def test_it_loads_exports_saves_and_computes(tmp_path: Path) -> None:
    site = install(tmp_path / "site", source())
    expected = make_checkpoint(tmp_path / "checkpoint")
    run(["-c", ROUND_TRIP, str(tmp_path / "checkpoint"), str(tmp_path)], site)
    original = load_file(tmp_path / "checkpoint" / "model.safetensors")
    for file in ("exported.safetensors", "saved/model.safetensors"):
        found = load_file(tmp_path / file)
        assert found.keys() == original.keys()
        assert all(found[name].equal(original[name]) for name in original)
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_verify_knows_it_and_says_that_transformers_does_not(tmp_path: Path) -> None:
    site = install(tmp_path / "site", source())
    make_checkpoint(tmp_path / "checkpoint")
    out = run(["-m", "mbridge", "verify", str(tmp_path / "checkpoint"), "--tp", "2", "--pp", "2"], site)
    assert "forward  skipped: transformers cannot load the model" in out
    assert out.endswith("\n0 differences\n")


@pytest.mark.slow
def test_an_error_planted_in_its_table_shows_in_the_logits(tmp_path: Path) -> None:
    wrong = source().replace('THEIRS + "w1.weight", THEIRS + "w3.weight"', 'THEIRS + "w3.weight", THEIRS + "w1.weight"')
    assert wrong != source()
    site = install(tmp_path / "site", wrong)
    expected = make_checkpoint(tmp_path / "checkpoint")
    run(["-c", ROUND_TRIP, str(tmp_path / "checkpoint"), str(tmp_path)], site)
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    assert float((logits - expected).abs().max()) > 0.01
