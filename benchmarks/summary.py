"""A compact table of the JSON files that gpu_all.sh left in a folder.

python benchmarks/summary.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from measure import print_table

MIB = 1 << 20
MEMORY = (": before", ": connected", ": refitted")


def main() -> None:
    results = {file.stem: json.loads(file.read_text()) for file in sorted(Path(sys.argv[1]).glob("*.json"))}
    results = {case: result for case, result in results.items() if "rows" in result and "shape" in result}
    rows = [line for case, result in results.items() for line in _rows(case, result)]
    if rows:
        print_table(rows)
    for case, result in results.items():
        for fact in _facts(result):
            print(f"{case}: {fact}")


def _rows(case: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    trainer = result.get("trainer", {})
    layout = "x".join(f"{name}{trainer[name]}" for name in ("tp", "ep", "etp") if (trainer.get(name) or 1) > 1)
    return [
        {
            "case": case,
            "shape": result["shape"],
            "trainer": layout,
            "engine": result["quantization"] or result["engine"] if "quantization" in result else result["engine"],
            "what": line["what"],
            "ms": line["seconds"] * 1e3,
            "min": line["min"] * 1e3,
            "max": line["max"] * 1e3,
            "limit": line["bytes"] / 1e6 / result["memcpy_gb_s"],
            "x limit": 1 / line["share of memcpy"],
        }
        for line in result["rows"]
    ]


def _facts(result: dict[str, Any]) -> list[str]:
    facts = []
    for path, found in result.get("paths", {}).items():
        if "total_s" not in found:
            continue
        phases = " ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in found["phases_s"].items())
        used = [result["memory"].get(path + when, {}).get("gpu", 0) / MIB for when in MEMORY]
        facts.append(
            f"{path}: connect {found['connect_s']:.1f} s, first refit {found['first_refit_s']:.2f} s; ms: {phases}, "
            f"load {found['load_s'] * 1e3:.1f}; groups {found['groups']}; {found['num_reasons']} modules not direct "
            f"{list(found['reasons'].items())[:1]}; GPU MiB +{used[1] - used[0]:.0f} connected, "
            f"+{used[2] - used[0]:.0f} refitted; engine's table {found['engine_extra_bytes'] / MIB:.1f} MiB"
        )
        if "same_tokens_as_first_path" in found:
            facts.append(f"{path}: tokens equal to the first path's: {found['same_tokens_as_first_path']}")
        checked = found.get("verify")
        if checked:
            in_sync = checked["in_sync"]
            facts.append(
                f"{path}: verify {checked['seconds'] * 1e3:.0f} ms, sync with verify "
                f"{checked['sync_verify_s'] * 1e3:.0f} ms: {checked['compared']} of {checked['of']} compared, "
                f"wrong {checked['wrong']}, in sync {in_sync['wrong']} wrong {in_sync['unchecked']} unchecked; "
                f"changed element found in {list(checked['found'])}"
            )
    keys = ("tokens_changed", "num_graphs", "keep", "soak", "details")
    facts += [f"{key}: {result[key]}" for key in keys if result.get(key) not in (None, 0, {})]
    memory = result.get("memory", {})
    if "soak: after" in memory:
        before, after = memory["soak: before"], memory["soak: after"]
        growth = (after["gpu"] - before["gpu"]) / MIB
        facts.append(f"soak: GPU {growth:+.1f} MiB, engine {before['engine']} -> {after['engine']}")
    facts += [f"ERROR in {stage}: {text.strip().splitlines()[-1][:300]}" for stage, text in result["errors"].items()]
    return [*facts, f"{result['seconds']['all']:.0f} s in all"]


if __name__ == "__main__":
    main()
