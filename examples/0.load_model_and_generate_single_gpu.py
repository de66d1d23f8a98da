"""Load a Hugging Face checkpoint into Megatron-Core and generate from it. One process, GPU or CPU.

    python examples/0.load_model_and_generate_single_gpu.py --model_path CHECKPOINT --prompt "Hello"

Without --model_path a small random model is made, so that the script runs anywhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tiny_model import make_checkpoint
from transformers import AutoTokenizer

from mbridge import AutoBridge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", help="a folder, or a hub id in the local cache")
    parser.add_argument("--prompt", default="A bridge is ")
    parser.add_argument("--max_tokens", type=int, default=20)
    args = parser.parse_args()
    path = args.model_path or make_checkpoint(Path("runs/tiny"))

    # Megatron-Core needs a parallel state; in a plain process get_model() starts a world of one rank.
    bridge = AutoBridge.from_pretrained(path, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    (model,) = bridge.get_model(weight_path=path)
    model.eval()

    tokenizer = AutoTokenizer.from_pretrained(bridge.path)
    device = next(model.parameters()).device
    tokens = tokenizer(args.prompt, return_tensors="pt").input_ids.to(device)
    with torch.no_grad():
        for _ in range(args.max_tokens):
            size = tokens.shape[1]
            positions = torch.arange(size, device=device)[None]
            causal = torch.ones(1, 1, size, size, dtype=torch.bool, device=device).triu(1)  # True is masked
            logits = model(tokens, positions, causal)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    print(repr(tokenizer.decode(tokens[0])))


if __name__ == "__main__":
    main()
