"""Load a Hugging Face checkpoint into Megatron-Core, export it again, and compare every tensor bit for bit.

    python examples/1.load_model_and_export_single_gpu.py --model_path CHECKPOINT [--save_path FOLDER]

Without --model_path a small random model is made, so that the script runs anywhere. One process, GPU or CPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from tiny_model import make_checkpoint
from tqdm import tqdm

from mbridge import AutoBridge


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", help="a folder, or a hub id in the local cache")
    parser.add_argument("--save_path", help="also write a checkpoint there")
    args = parser.parse_args()
    path = args.model_path or make_checkpoint(Path("runs/tiny-bf16"), dtype=torch.bfloat16)

    bridge = AutoBridge.from_pretrained(path)
    models = bridge.get_model()
    bridge.load_weights(models, path)

    original = {}
    for file in sorted(bridge.path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            original |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict

    differing = []
    for name, tensor in tqdm(bridge.export_weights(models), total=len(original), desc="comparing"):
        if not torch.equal(tensor.cpu(), original.pop(name)):
            differing.append(name)
    if args.save_path:
        bridge.save_weights(models, args.save_path)
        print(f"saved to {args.save_path}")
    print(f"{len(differing)} tensors differ, {len(original)} were not exported", *differing, *original, sep="\n  ")
    return 1 if differing or original else 0


if __name__ == "__main__":
    sys.exit(main())
