"""Plants one error at a time in a copy of mbridge and asks the quick checks of the test suite whether they see it.

    python tests/mbridge/mutations.py [--only TEXT] [--json FILE]

Each mutation replaces a text that occurs once in a file of mbridge, and names the checks that have to notice: the
position-coded layouts over several topologies, or forward parity of one model with transformers on one rank. The
unchanged copy has to pass all checks. Exit status 1 if a planted error is missed.

Every mutation runs in a forked process, whose parent has imported torch and Megatron-Core but never mbridge.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0
LAYOUTS = "layouts"
BIAS = "fp32 bias in a bf16 model"
PARITY = ("qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "llama3", "llama linear")


@dataclass(frozen=True)
class Mutation:
    """`old` occurs once in mbridge/`file`; with `new` in its place one of `checks` must fail."""

    name: str
    file: str
    old: str
    new: str
    checks: tuple[str, ...] = (LAYOUTS,)


MUTATIONS = (
    Mutation(
        "gate and up swapped", "families/_blocks.py",
        '(theirs + "gate_proj.weight", theirs + "up_proj.weight")',
        '(theirs + "up_proj.weight", theirs + "gate_proj.weight")',
    ),
    Mutation(
        "gate and up swapped in experts", "families/_moe.py",
        "for part in (names.gate, names.up))\n    rows.append(",
        "for part in (names.up, names.gate))\n    rows.append(",
    ),
    Mutation(
        "gate and up swapped in shared experts", "families/_moe.py",
        'f"{names.shared}{part}.weight" for part in (names.gate, names.up)',
        'f"{names.shared}{part}.weight" for part in (names.up, names.gate)',
    ),
    Mutation(
        "gate and up cut apart", "ops.py",
        "for rank in range(size) for tensor in (0, 1)]", "for tensor in (0, 1) for rank in range(size)]",
    ),
    Mutation("q, k, v bias dropped", "families/_blocks.py", "    if qkv_bias:", "    if qkv_bias is None:"),
    Mutation(
        "attention groups reversed", "ops.py",
        "for group in range(self.num_groups)\n", "for group in reversed(range(self.num_groups))\n",
    ),
    Mutation(
        "q_norm and k_norm swapped", "families/_blocks.py",
        'hf=f"{theirs}{p}_norm.weight"', "hf=f\"{theirs}{dict(q='k', k='q')[p]}_norm.weight\"",
    ),
    Mutation("experts counted from 0 on every rank", "plan.py", "first = at.ep * num_local", "first = 0"),
    Mutation(
        "experts dealt to ranks backwards", "plan.py",
        "first = at.ep * num_local", "first = (topology.ep - 1 - at.ep) * num_local",
    ),
    Mutation(
        "experts cut over tp instead of etp", "plan.py",
        "(at.etp, topology.expert_tp) if row.num_experts", "(at.tp, topology.tp) if row.num_experts",
    ),
    Mutation(
        "expert down projection cut along its outputs", "families/_moe.py",
        'RowParallel(axis="etp")', 'Column(axis="etp")',
    ),
    Mutation(
        "packed experts not transposed", "plan.py", "(rows, columns), (1, rows))", "(rows, columns), (columns, 1))"
    ),
    Mutation("ep counted before etp", "topology.py",
             "in_stage, self.expert_tp)\n        edp, ep = divmod(edp_ep, self.ep)",
             "in_stage, self.ep)\n        etp, (edp, ep) = edp_ep % self.expert_tp, (edp_ep // self.expert_tp, etp)"),
    Mutation("each tp rank sends its replicated tensors", "topology.py", "(axis is not None or index == 0)", "True"),
    Mutation("shared expert's gate dropped", "families/_moe.py", "    if shared_gate:", "    if shared_gate is None:"),
    Mutation(
        "shared expert's gate not built", "families/qwen2_moe.py",
        '"moe_shared_expert_gate": True', '"moe_shared_expert_gate": False', ("qwen2_moe",),
    ),
    Mutation("expert bias dropped", "families/_moe.py", "    if expert_bias:", "    if expert_bias is None:"),
    Mutation("expert bias in the model's dtype", "families/_moe.py", "dtype=torch.float32,", "dtype=None,"),
    Mutation(
        "expert bias left cast to bf16", "megatron/build.py",
        "                restore()", "                pass", (BIAS,),
    ),
    Mutation(
        "latent down projection always cut", "families/_mla.py",
        "(kv_rank + rope, hidden), ColumnOrReplicated()", "(kv_rank + rope, hidden), Column()",
    ),
    Mutation("tied head sent as well", "families/_blocks.py", "Vocab(), copy=tied)", "Vocab())"),
    Mutation(
        "tied head not copied from the embedding", "families/_blocks.py",
        'source = "model.embed_tokens.weight" if tied else "lm_head.weight"', 'source = "lm_head.weight"',
    ),
    Mutation(
        "the last stage's embedding of MTP layers sent too", "families/_blocks.py", ", first_stage=True", ""
    ),
    Mutation("MTP layers read one layer early", "families/_moe.py", "hf_offset=offset,", "hf_offset=offset - 1,"),
    Mutation(
        "eh_proj replicated", "families/_moe.py",
        "((hidden, 2 * hidden),), Column()", "((hidden, 2 * hidden),), Replicated()",
    ),
    Mutation("sparse step counted from 0", "families/_moe.py", "(n + 1) % step == 0", "n % step == 0"),
    Mutation("padding before the vocabulary", "ops.py",
             "return [Segment(0, 0, vocab)] + ([Segment(None, vocab, rows)] if rows > vocab else [])",
             "return ([Segment(None, vocab, rows)] if rows > vocab else []) + [Segment(0, 0, vocab)]"),
    Mutation(
        "pre_softmax flipped", "families/qwen3_moe.py",
        "pre_softmax=not config.get", "pre_softmax=config.get", ("qwen3_moe",),
    ),
    Mutation("mixtral not renormalised", "families/mixtral.py", "pre_softmax=False", "pre_softmax=True", ("mixtral",)),
    Mutation(
        "n_group dropped", "families/_moe.py", 'if (config.get("n_group") or 1) > 1:', "if False:", ("deepseek_v3",)
    ),
    Mutation(
        "routed_scaling_factor dropped", "families/_moe.py",
        '"moe_router_topk_scaling_factor": config.get("routed_scaling_factor") or 1.0',
        '"moe_router_topk_scaling_factor": 1.0', ("deepseek_v3",),
    ),
    Mutation("yarn as plain rope", "families/_mla.py", '"rope_type": "yarn"', '"rope_type": "rope"', ("deepseek_v3",)),
    Mutation(
        "mscale_all_dim dropped", "families/_mla.py",
        'rope.get("mscale_all_dim") or 0.0', "0.0", ("deepseek_v3",),
    ),
    Mutation(
        "partial rope as full rope", "families/_blocks.py",
        "1.0 if fraction is None else fraction", "1.0", ("glm4_moe",),
    ),
    Mutation(
        "llama3 rope as linear", "families/_blocks.py",
        'arguments |= {"rope_scaling": True, "rope_scaling_factor": _factor(extra)}',
        'arguments["seq_len_interpolation_factor"] = _factor(extra)', ("llama3",),
    ),
    Mutation(
        "linear rope not scaled", "families/_blocks.py",
        'arguments["seq_len_interpolation_factor"] = _factor(extra)', "_factor(extra)", ("llama linear",),
    ),
    Mutation(
        "Megatron-Core's own epsilon", "families/_blocks.py",
        'config.get("rms_norm_eps", 1e-6)', "1e-5", ("qwen3_moe",),
    ),
)  # fmt: skip


# What follows imports mbridge, and so runs only in forked processes.


def layouts() -> list[str]:
    """The position-coded checks, each family over topologies in which everything is cut."""
    from tests.mbridge import moe_coded, position_coded
    from tests.mbridge.reference import Model

    found: list[str] = []
    for model in (Model("llama"), Model("qwen2", tied=True), Model("qwen3")):
        rows = position_coded.family_rows(model)
        found += position_coded.differences(model, rows, tp=2, stages=[[0], [1]], naming="te")
        found += position_coded.differences(model, rows, tp=4)
    for moe in moe_coded.MODELS.values():
        rows = moe_coded.rows_of(moe)
        layers = list(range(moe.layers))
        stages = [layers[:1], layers[1:]]
        found += moe_coded.differences(moe, rows, tp=2, ep=2, etp=1, stages=stages, naming="te", experts="grouped")
        found += moe_coded.differences(moe, rows, tp=1, ep=2, etp=2, experts="legacy")
        found += moe_coded.differences(moe, rows, tp=4, ep=1, etp=2)
    return found


def parity(folder: Path, name: str) -> list[str]:
    """Logits, and the experts chosen, of a Megatron-Core model on one rank against those of transformers."""
    import torch

    from mbridge import AutoBridge
    from tests.mbridge import moe_hf, small_hf

    expected_logits, expected_chosen = pickle.loads((folder / "expected.pkl").read_bytes())
    bridge = AutoBridge.from_pretrained(folder, dtype=torch.float32)
    chunks = bridge.get_model(folder)
    chosen: dict[int, Any] = {}
    if name in moe_hf.CASES:
        tokens, vocab = moe_hf.tokens_of(moe_hf.CASES[name]), moe_hf.CASES[name].model.vocab
        chosen = moe_hf.watch_routers(chunks, moe_hf.CASES[name])
    else:
        tokens, vocab = small_hf.tokens_of(small_hf.CASES[name]), small_hf.CASES[name].model.vocab
    batch, length = tokens.shape
    mask = torch.triu(torch.ones(length, length), 1).bool()[None, None]
    with torch.no_grad():
        logits = chunks[0].eval()(tokens, torch.arange(length).expand(batch, length), mask)[..., :vocab]
    distance = float((logits - expected_logits).abs().max())
    found = [] if distance <= 1e-4 else [f"{name}: logits differ by {distance:.3g}"]
    return found + [
        f"{name}: layer {layer} chooses other experts"
        for layer, of_layer in expected_chosen.items()
        if layer not in chosen or not torch.equal(chosen[layer], of_layer)
    ]


def bias_of_a_bf16_model(folder: Path) -> list[str]:
    import torch
    from safetensors.torch import load_file

    from mbridge import AutoBridge

    bridge = AutoBridge.from_pretrained(folder)
    exported = dict(bridge.export_weights(bridge.get_model(folder)))
    original = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    biases = [name for name in original if name.endswith("e_score_correction_bias")]
    assert biases
    return [
        f"{name} differs"
        for name in biases
        if exported[name].dtype is not torch.float32 or not torch.equal(exported[name], original[name])
    ]


def check(package: Path, checkpoints: Path, checks: Sequence[str]) -> list[str]:
    """What the checks say of the mbridge in `package`; that it refuses a model of its own is an answer as well."""
    sys.path[:0] = [str(package), str(ROOT)]
    import mbridge

    assert Path(mbridge.__file__).is_relative_to(package), mbridge.__file__
    from mbridge.errors import MBridgeError

    found: list[str] = []
    for name in checks:
        try:
            if name == LAYOUTS:
                found += layouts()
            elif name == BIAS:
                found += bias_of_a_bf16_model(checkpoints / "deepseek_v3")
            else:
                found += parity(checkpoints / name, name)
        except MBridgeError as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
        except KeyError as error:
            if name != LAYOUTS:
                raise
            found.append(f"{name}: a piece of {error}, which is not in the checkpoint")
    return found


def make_checkpoints(folder: Path) -> list[str]:
    """The models of the parity checks, by transformers."""
    sys.path.insert(0, str(ROOT))
    from transformers.utils import logging

    from tests.mbridge import moe_hf, small_hf

    logging.disable_progress_bar()
    for name in PARITY:
        (folder / name).mkdir()
        if name in moe_hf.CASES:
            expected = moe_hf.make(moe_hf.CASES[name], folder / name)
            result = (expected.logits, expected.chosen)
        else:
            result = (small_hf.make(small_hf.CASES[name], folder / name), {})
        (folder / name / "expected.pkl").write_bytes(pickle.dumps(result))
    return []


# The parent.


def forked(action: Callable[[], list[str]]) -> list[str]:
    """`action()` in a process of its own. Raises RuntimeError with its traceback if it does not return."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _answer(action, send)
    os.close(send)
    os.set_blocking(receive, False)
    deadline = time.monotonic() + TIMEOUT_S
    answer = b""
    while True:
        try:
            part = os.read(receive, 1 << 16)
            if not part:
                break
            answer += part
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.01)
    os.close(receive)
    os.waitpid(child, 0)
    done, value = json.loads(answer) if answer else (False, "it died, or took too long")
    if not done:
        raise RuntimeError(value)
    return list(value)


def _answer(action: Callable[[], list[str]], pipe: int) -> NoReturn:
    """Never returns into the parent's stack, whatever happens."""
    try:
        warnings.simplefilter("ignore")
        answer: tuple[bool, Any] = (True, action())
    except BaseException:  # noqa: BLE001 - the parent raises it
        answer = (False, traceback.format_exc())
    with open(pipe, "wb") as file:
        file.write(json.dumps(answer).encode())
    os._exit(0)


def mutated(mutation: Mutation | None, folder: Path) -> Path:
    """A folder that holds a copy of the package with the error in it."""
    shutil.copytree(ROOT / "mbridge", folder / "mbridge", ignore=shutil.ignore_patterns("__pycache__"))
    if mutation is not None:
        path = folder / "mbridge" / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            raise ValueError(
                f"mutation {mutation.name!r}: {mutation.old!r} should occur once in {mutation.file}, found "
                f"{text.count(mutation.old)} times; write the mutation anew"
            )
        path.write_text(text.replace(mutation.old, mutation.new))
    return folder


def warm_up() -> None:
    """Import once what every check needs, mbridge aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hypothesis  # noqa: F401
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer  # noqa: F401
        import torch

    torch.set_num_threads(1)
    assert "mbridge" not in sys.modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutations whose name contains this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if args.only in mutation.name]
    start = time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warm_up()
    results = []
    with tempfile.TemporaryDirectory(prefix="mutations_") as scratch:
        checkpoints = Path(scratch) / "checkpoints"
        checkpoints.mkdir()
        forked(lambda: make_checkpoints(checkpoints))
        for number, mutation in enumerate([None, *chosen]):
            package = mutated(mutation, Path(scratch) / str(number))
            checks = (LAYOUTS, BIAS, *PARITY) if mutation is None else mutation.checks
            began = time.perf_counter()
            if mutation is None:  # each in a process of its own: they are one world each
                problems = [p for c in checks for p in forked(lambda p=package, c=c: check(p, checkpoints, [c]))]
            else:
                problems = forked(lambda p=package, c=checks: check(p, checkpoints, c))
            results.append(
                {
                    "mutation": None if mutation is None else mutation.name,
                    "caught": bool(problems),
                    "by": problems[0][:300] if problems else None,
                    "seconds": time.perf_counter() - began,
                }
            )
            verdict = (
                ("passes" if not problems else "FAILS") if mutation is None else "caught" if problems else "MISSED"
            )
            print(f"{verdict:7} {mutation.name if mutation else 'the unchanged package'}", flush=True)
            for problem in problems[:1] if mutation is not None else problems:
                print("          " + problem.splitlines()[0][:150])
    planted = results[1:]
    caught = sum(result["caught"] for result in planted)
    summary = {"caught": caught, "total": len(planted), "control": results[0], "mutations": planted,
               "seconds": time.perf_counter() - start}  # fmt: skip
    print(f"{caught} of {len(planted)} planted errors caught in {summary['seconds']:.0f} s")
    if args.json is not None:
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    sys.exit(caught != len(planted) or results[0]["caught"])


if __name__ == "__main__":
    main()
