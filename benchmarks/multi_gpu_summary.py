"""A compact table of the JSON files that multi_gpu_all.sh left in a folder.

python benchmarks/multi_gpu_summary.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import print_table


def main() -> None:
    results = {file.stem: json.loads(file.read_text()) for file in sorted(Path(sys.argv[1]).glob("*.json"))}
    results = {case: result for case, result in results.items() if "kind" in result}
    rows = [_row(case, result, line) for case, result in results.items() for line in result["rows"] if "what" in line]
    if rows:
        print_table(rows)
    for case, result in results.items():
        for fact in _facts(result):
            print(f"{case}: {fact}")


def _row(case: str, result: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    raw = result.get("raw", {}).get("best_s")
    return {
        "case": case,
        "shape": result["shape"],
        "what": line["what"],
        "ms": line["seconds"] * 1e3,
        "min": line["min"] * 1e3,
        "max": line["max"] * 1e3,
        "GB/s": line["GB/s"],
        "raw ms": raw and raw * 1e3,
        "share of raw": raw and raw / line["seconds"],
    }


def _facts(result: dict[str, Any]) -> Iterator[str]:
    for path, found in result.get("paths", {}).items():
        yield f"{path}: {_of_path(found)}"
    for name, found in result.get("scenarios", {}).items():
        yield f"{name}: {'good' if found['is_good'] else 'BAD'} {found}"
    raw = result.get("raw", {}).get("pieces", {})
    if raw:
        yield "raw GB/s: " + ", ".join(f"{name} {piece['GB/s']:.1f}" for name, piece in raw.items())
    for key in ("link_gb_s", "owned_bytes", "tokens_changed", "details"):
        if key in result:
            yield f"{key}: {result[key]}"
    for stage, text in result["errors"].items():
        yield f"ERROR in {stage}: {text.strip().splitlines()[-1][:300]}"
    yield f"{result['seconds'].get('all', 0):.0f} s in all: {result['seconds']}"


def _of_path(found: dict[str, Any]) -> str:
    if "phases_s" not in found:
        return "no refit"
    phases = " ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in found["phases_s"].items())
    text = (
        f"connect {found['connect_s']:.1f} s, first {found['first_refit_s']:.2f} s; ms: {phases}, "
        f"fill {found['fill_s'] * 1e3:.1f} load {found['load_s'] * 1e3:.1f}; {found['num_buckets']} buckets of "
        f"{found['bucket_bytes'] / 2**20:.0f} MiB; groups {found['groups']}; {found['num_reasons']} modules not direct"
    )
    for name in ("share_of_raw", "stream_share_of_raw", "crossing_limit_s", "same_tokens_as_first_path"):
        if name in found:
            text += f"; {name} {found[name]}"
    checked = found.get("verify")
    if checked:
        text += (
            f"; verify: {checked['compared']} of {checked['of']} compared, {len(checked['wrong'])} wrong, "
            f"{checked['num_unchecked']} unchecked, changed element found in {list(checked['found'])}"
        )
    return text


if __name__ == "__main__":
    main()
