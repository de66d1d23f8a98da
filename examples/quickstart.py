"""GRPO end to end: a tensor-parallel Megatron-Core policy, rollouts from a real vLLM, a refit after every step.

    bash examples/quickstart.sh              # sets everything up, then runs this file on two ranks
    bash examples/quickstart.sh --no-sync    # the control: vLLM never gets the new weights

The task: continue a text with vowels. The reward of a reply is the share of its characters that are vowels; a random
model scores about 0.02. Rank 0 samples groups of replies from vLLM, both ranks train on them, `syncer.sync()` refits
vLLM. "KL" compares the log-probs that vLLM gave its tokens with those of the Megatron policy: near zero just after a
refit if, and only if, vLLM serves exactly the trained weights.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from plot import plot_run
from tiny_model import make_checkpoint

from mbridge import AutoBridge, destroy_parallel, init_parallel
from mbridge_rl.engines.vllm import start_llm
from mbridge_rl.syncer import WeightSyncer

PROMPTS = ["the sea says ", "a bird sings ", "the wind hums ", "one owl calls "]
GROUP_SIZE = 32  # replies to each prompt
REPLY_TOKENS = 24
CLIP = 0.2


def reward(reply: str) -> float:
    """Share of the reply's characters that are vowels, 0 to 1."""
    return sum(char in "aeiouAEIOU" for char in reply) / REPLY_TOKENS


def sample(llm) -> dict[str, torch.Tensor]:
    """Replies of vLLM to every prompt as tensors: tokens [n, s], log-probs and mask [n, s-1], rewards [n]."""
    from vllm import SamplingParams

    params = SamplingParams(n=GROUP_SIZE, max_tokens=REPLY_TOKENS, logprobs=0, ignore_eos=True)
    tokens, logprobs, rewards = [], [], []
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        for reply in output.outputs:
            tokens.append([*output.prompt_token_ids, *reply.token_ids])
            logprobs.append([step[token].logprob for step, token in zip(reply.logprobs, reply.token_ids, strict=True)])
            rewards.append(reward(reply.text))
    length = max(map(len, tokens))
    batch = {
        "tokens": torch.zeros(len(tokens), length, dtype=torch.long),
        "logprobs": torch.zeros(len(tokens), length - 1),
        "mask": torch.zeros(len(tokens), length - 1),
        "rewards": torch.tensor(rewards),
    }
    for row, (ids, probs) in enumerate(zip(tokens, logprobs, strict=True)):
        batch["tokens"][row, : len(ids)] = torch.tensor(ids)
        reply_part = slice(len(ids) - 1 - REPLY_TOKENS, len(ids) - 1)
        batch["logprobs"][row, reply_part] = torch.tensor(probs)
        batch["mask"][row, reply_part] = 1
    return batch


def policy_logprobs(model, tokens: torch.Tensor) -> torch.Tensor:
    """Log-prob of each next token under the Megatron policy, [n, s-1]. Both ranks compute it together."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    size = inputs.shape[1]
    positions = torch.arange(size, device=tokens.device).expand_as(inputs)
    causal = torch.ones(1, 1, size, size, dtype=torch.bool, device=tokens.device).triu(1)
    return -model(inputs, positions, causal, labels=labels)


def grpo_step(model, optimizer, batch: dict[str, torch.Tensor]) -> float:
    """One clipped policy-gradient step on group-normalised rewards. Returns KL(vLLM || policy) before the step."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    groups = batch["rewards"].view(-1, GROUP_SIZE)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    log_ratio = (policy_logprobs(model, batch["tokens"]) - batch["logprobs"]) * batch["mask"]
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    loss = -(gain * batch["mask"]).sum() / batch["mask"].sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    log_ratio = log_ratio.detach().double()  # exp(x) - 1 - x of a tiny x needs the precision
    return float((log_ratio.expm1() - log_ratio).sum() / batch["mask"].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-sync", action="store_true", help="never refit vLLM: KL grows, the reward stays")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    args = parser.parse_args()

    init_parallel(tp=int(os.environ["WORLD_SIZE"]), seed=0)
    rank = dist.get_rank()
    if rank == 0:
        make_checkpoint(args.out / "checkpoint")
    dist.barrier()

    bridge = AutoBridge.from_pretrained(args.out / "checkpoint", dtype=torch.float32)
    (model,) = bridge.get_model(weight_path=bridge.path)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    # The engine lives beside rank 0, in fp32 like the policy, so that their log-probs can be compared closely.
    options = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "gpu_memory_utilization": 0.3}
    llm = start_llm(str(bridge.path), **options) if rank == 0 else None

    history = []
    with WeightSyncer(bridge, llm) as syncer:
        for step in range(args.iterations):
            batch = [sample(llm) if rank == 0 else None]
            dist.broadcast_object_list(batch)
            kl = grpo_step(model, optimizer, batch[0])
            report = None if args.no_sync else syncer.sync()
            mean_reward = float(batch[0]["rewards"].mean())
            history.append({"reward": mean_reward, "kl": kl, "refit_ms": report and report.total_s * 1e3})
            if rank == 0:
                print(f"step {step:3d}  reward {mean_reward:.3f}  KL {kl:.1e}  {report or 'no refit'}", flush=True)
    if rank == 0:
        first, last = history[0]["reward"], history[-1]["reward"]
        mean_kl = sum(entry["kl"] for entry in history) / len(history)
        picture = plot_run(history, args.out / ("no-sync.png" if args.no_sync else "quickstart.png"))
        print(f"reward {first:.3f} -> {last:.3f}; mean KL {mean_kl:.1e}; {picture}")
    destroy_parallel()


if __name__ == "__main__":
    main()
