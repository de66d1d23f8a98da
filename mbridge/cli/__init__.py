"""The command line: what mbridge makes of a checkpoint, whether that is right, and checkpoints written anew.

    python -m mbridge inspect PATH [--tp 2 --pp 2 --rank 1]      what a rank stores; needs no Megatron-Core
    python -m mbridge verify PATH [--tp 2 --pp 2 --ep 2]         load, export, compare bit for bit, compare logits
    python -m mbridge convert PATH OUT [--dtype bfloat16]        re-shard or re-cast; needs no Megatron-Core

The exit status is 0, 1 if `verify` found differences, or 2 for arguments or files that cannot be used.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from ..errors import MBridgeError
from .conversion import convert
from .expected import fitting_topology
from .inspection import inspect
from .verification import Request, verify

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_UNITS: Final = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except MBridgeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mbridge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("inspect", help="the family of a checkpoint and what one rank stores of it")
    command.set_defaults(run=_inspect)
    _add_model(command)
    _add_topology(command)
    command.add_argument("--rank", type=int, default=0, help="which rank (default 0)")
    command.add_argument("--naming", choices=("te", "local"), default="te", help="TransformerEngine's names, or local")
    command.add_argument("--json", action="store_true", help="every local tensor and piece, as JSON")

    command = commands.add_parser("verify", help="load, export, compare every tensor; compare logits with transformers")
    command.set_defaults(run=_verify)
    _add_model(command)
    _add_topology(command)
    command.add_argument("--against", type=Path, help="compare with this checkpoint instead of the one that is loaded")
    command.add_argument(
        "--forward", action=argparse.BooleanOptionalAction, default=None,
        help="compare fp32 logits with transformers' (default: if transformers and the memory allow it)",
    )  # fmt: skip
    command.add_argument("--spec", choices=("auto", "te", "local"), default="auto", help="layers of the model")
    command.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs, if there is one for each rank"
    )
    command.add_argument("--timeout", type=float, default=3600.0, help="seconds for each phase (default 3600)")

    command = commands.add_parser("convert", help="write a checkpoint anew, in other shards or another dtype")
    command.set_defaults(run=_convert)
    _add_model(command)
    command.add_argument("out", type=Path, help="the folder to write; what it holds stays whole until all is written")
    command.add_argument("--max-shard-size", type=_num_bytes, help="such as 5GB (default: files as they are)")
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", help="a folder, or a hub id in the local cache")
    command.add_argument("--dtype", choices=tuple(DTYPES), help="of the parameters (default: as on disk)")
    command.add_argument(
        "--ignore-config-field", action="append", default=[], metavar="FIELD",
        help="a field of config.json that you vouch for; may be repeated",
    )  # fmt: skip


def _add_topology(command: argparse.ArgumentParser) -> None:
    for axis in ("tp", "pp", "vpp", "ep"):
        command.add_argument(f"--{axis}", type=int, default=1, metavar="N")
    command.add_argument("--etp", type=int, metavar="N", help="tensor-parallel size of experts (default: tp)")
    command.add_argument("--layers-first", type=int, metavar="N", help="layers of the first pipeline stage")
    command.add_argument("--layers-last", type=int, metavar="N", help="layers of the last pipeline stage")


def _inspect(args: argparse.Namespace) -> int:
    topology = fitting_topology(args.tp, args.pp, args.vpp, args.ep, args.etp)
    inspect(
        args.path,
        topology,
        rank=args.rank,
        naming=args.naming,
        dtype=DTYPES.get(args.dtype),
        layers_first=args.layers_first,
        layers_last=args.layers_last,
        ignore_config_fields=args.ignore_config_field,
        as_json=args.json,
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    request = Request(
        path=args.path,
        topology=fitting_topology(args.tp, args.pp, args.vpp, args.ep, args.etp),
        dtype=DTYPES.get(args.dtype),
        layers_first=args.layers_first,
        layers_last=args.layers_last,
        against=args.against,
        forward=args.forward,
        spec=args.spec,
        device=args.device,
        timeout_s=args.timeout,
        ignore_config_fields=tuple(args.ignore_config_field),
    )
    return 0 if verify(request) else 1


def _convert(args: argparse.Namespace) -> int:
    convert(
        args.path,
        args.out,
        dtype=DTYPES.get(args.dtype),
        max_shard_bytes=args.max_shard_size,
        ignore_config_fields=args.ignore_config_field,
    )
    return 0


def _num_bytes(text: str) -> int:
    """5GB is 5 * 10**9, as in transformers; 5GiB is 5 * 2**30."""
    found = re.fullmatch(r"(\d+)\s*([a-zA-Z]*)", text)
    if found is None or found[2].upper() not in _UNITS or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 5GiB, found {text!r}")
    return int(found[1]) * _UNITS[found[2].upper()]
