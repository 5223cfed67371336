"""Peers beside the engine: python -m bench.peers [--only NAME,NAME] [--rounds N] [--out FILE]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.conditions import RESULTS
from bench.machine import slug
from bench.peers import LIMIT, Peer, line, run, write
from bench.peers.ctgan import CTGAN
from bench.peers.lightning import LIGHTNING
from bench.peers.loops import DCGAN, WGAN_GP
from bench.peers.torchgan import TORCHGAN
from fastgan import machine
from fastgan.errors import InputError, unknown

PEERS: dict[str, Peer] = {peer.name: peer for peer in (CTGAN, LIGHTNING, DCGAN, WGAN_GP, TORCHGAN)}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 where a peer is wrong or failed; 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--only", metavar="NAMES", help=f"of {', '.join(PEERS)}; with commas between")
    parser.add_argument("--rounds", type=int, default=15, help="blocks of every side (15)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON; bench/results/<device>/peers.json where not given")
    args = parser.parse_args(argv)
    try:
        return measured(args)
    except InputError as e:
        print(f"peers: {e}", file=sys.stderr)
        return 2


def measured(args: argparse.Namespace) -> int:
    names = args.only.split(",") if args.only else [*PEERS]
    for name in names:
        if name not in PEERS:
            raise unknown("--only", name, PEERS)
    for option in ("rounds", "threads"):
        if getattr(args, option) < 1:
            raise InputError(f"--{option}: is {getattr(args, option)}, expected >= 1")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    out = args.out or RESULTS / slug(device) / "peers.json"
    said = machine.conditions(
        device,
        packages={name: machine.version(name) for name in ("ctgan", "lightning", "torchgan")},
        timing=f"{args.rounds} rounds of blocks of iterations, sides interleaved, one block of each before them",
        check=f"one update in fp64 from the same weights and noise: parameters differ by at most {LIMIT:g}",
    )
    found = run({name: PEERS[name] for name in names}, device, args.rounds, print)
    print(f"\nmicroseconds per iteration, median, p20 … p80; {said['device_name']}, {said['torch_threads']} threads")
    for name, one in found.items():
        print(line(name, one))
    write(out, {"conditions": said, "peers": found})
    print(f"written to {out}")
    return int(any(one["status"] in ("wrong", "failed") for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
