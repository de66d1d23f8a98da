"""Load a Hugging Face checkpoint at any parallel topology, export it, compare every tensor bit for bit, and save it.

    torchrun --nproc-per-node 2 examples/2.load_export_multi_gpu.py --tp 2 --model_path CHECKPOINT [--save_path FOLDER]

Without --model_path a small random model is made, so that the script runs anywhere. As many processes as the topology
needs (a multiple of tp * pp), with a GPU each, or on the CPU. `python -m mbridge verify` does more, and starts them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from tiny_model import make_checkpoint
from tqdm import tqdm

from mbridge import AutoBridge, destroy_parallel, init_parallel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", help="a folder, or a hub id in the local cache")
    parser.add_argument("--save_path", help="also write a checkpoint there")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parser.add_argument("--vpp", type=int, default=1, help="model chunks in each stage")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel")
    parser.add_argument("--etp", type=int, help="tensor parallel inside experts (default: tp)")
    args = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    # One process makes the model; the others see it as soon as all have met in init_parallel().
    path = args.model_path or Path("runs/tiny-bf16")
    if args.model_path is None and rank == 0:
        make_checkpoint(path, dtype=torch.bfloat16)

    topology = init_parallel(tp=args.tp, pp=args.pp, vpp=args.vpp, ep=args.ep, etp=args.etp)
    bridge = AutoBridge.from_pretrained(path)
    models = bridge.get_model()  # this rank's chunks, one for each vpp stage
    num_bytes = bridge.load_weights(models, path)  # each rank reads only the slices that it stores
    print(f"rank {rank} of {topology.world_size}: {len(models)} chunks, {num_bytes / 1e6:.1f} MB read")

    original = {}
    if rank == 0:
        for file in sorted(bridge.path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                original |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict

    # The export is collective, and every rank gets every tensor; one of them compares.
    differing = []
    for name, tensor in tqdm(bridge.export_weights(models), total=len(original), desc="comparing", disable=rank != 0):
        if rank == 0 and not torch.equal(tensor.cpu(), original.pop(name)):
            differing.append(name)
    if args.save_path:
        bridge.save_weights(models, args.save_path)
    destroy_parallel()
    if rank == 0:
        if args.save_path:
            print(f"saved to {args.save_path}")
        print(f"{len(differing)} tensors differ, {len(original)} were not exported", *differing, *original, sep="\n  ")
    return 1 if differing or original else 0


if __name__ == "__main__":
    sys.exit(main())
