"""Our engine beside the scripts and the framework that people use: the same shards, models and machine, interleaved.

    make bench [ROUNDS=5]
    python tests/bench_peers.py [--rounds 3] [--rows free,gpu,cpu,free256] [--peers ours,plain,...] [--images N]

Prints a table (medians, and the spread in brackets) and writes JSON to --out. Ratios are medians of the ratios of each
round. Each run writes its rows to Parquet, and they are counted. Whoever has no Ray runs in a process of its own; Ray
Data and we have a warm cluster each. Nobody's clock counts the loading of a model. CPU and memory (PSS) are those of
the whole tree of processes, Ray's own included.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peers_ours
import peers_ray_data
import peers_scripts
from peers_hosts import RAY, RAY_DATA, Hosts, Measured, PeerFailed
from peers_report import as_json, as_text
from peers_workloads import (
    CORES,
    DEFAULT_ROWS,
    IMAGES_PER_SHARD,
    ROWS,
    Ran,
    Row,
    Work,
    make_shards,
    make_warm_shards,
    write_cpu_model,
)

BEGUN = time.monotonic()


@dataclass(frozen=True)
class Peer:
    """`images`: which of a row's numbers of images is its own. Of those with the same `ways`, only the fastest in a
    trial takes part."""

    name: str
    title: str
    host: str
    run: Callable[[Work], Ran]
    images: str = "num_images"
    ways: str = ""


PEERS = (
    Peer("stages", "stages, each alone", "stages", peers_ours.stages_alone),
    Peer("decode", "decode ceiling", "stages", peers_ours.decode_only, "peer_images"),
    Peer("plain", "plain loop", "plain", peers_scripts.plain_loop, "peer_images"),
    Peer("loader", "torch DataLoader", "loader", peers_scripts.data_loader, "peer_images"),
    Peer("ray_data", "Ray Data, defaults", RAY_DATA, peers_ray_data.defaults, "slow_images"),
    Peer("tuned_read", "Ray Data tuned, read_webdataset", RAY_DATA, peers_ray_data.tuned_read, "peer_images", "tuned"),
    Peer("tuned_tasks", "Ray Data tuned, whole batches", RAY_DATA, peers_ray_data.tuned_tasks, "peer_images", "tuned"),
    Peer("ours", "ours on Ray, decode threads", RAY, peers_ours.on_ray),
    Peer("ours_tasks", "ours on Ray, decode tasks", RAY, peers_ours.on_ray_tasks),
    Peer("ours_no_ray", "ours without Ray", "ours", peers_ours.without_ray),
)
TRIAL_IMAGES = 512


def main() -> None:
    arguments = _arguments()
    logging.disable(logging.WARNING)
    say(f"{CORES} cores, {arguments.rounds} rounds")
    rows = [row for row in ROWS if row.name in arguments.rows]
    peers = [peer for peer in PEERS if peer.name in arguments.peers]
    with tempfile.TemporaryDirectory() as folder, Hosts() as hosts:
        most = min(arguments.images or 10**9, max(row.num_images for row in rows))
        make_shards(Path(folder), most)
        make_warm_shards(Path(folder) / "warm")
        bench = Bench(hosts, Path(folder), most, write_cpu_model(Path(folder) / "model"))
        measured = {row: bench.row(row, peers, arguments.rounds) for row in rows}
        idle = hosts.idle(5.0)
    report = as_json(measured, {peer.name: peer.title for peer in peers}, idle)
    Path(arguments.out).write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(as_text(report) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, help="at most so many in a run")
    parser.add_argument("--rows", type=_names({row.name for row in ROWS}), default=set(DEFAULT_ROWS))
    parser.add_argument("--peers", type=_names({peer.name for peer in PEERS}), default={peer.name for peer in PEERS})
    parser.add_argument("--out", default="bench-peers.json")
    return parser.parse_args()


def _names(known: set[str]) -> Callable[[str], set[str]]:
    def parse(text: str) -> set[str]:
        if unknown := set(text.split(",")) - known:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(sorted(known))}")
        return set(text.split(","))

    return parse


@dataclass
class Bench:
    """Runs peers on one set of shards."""

    hosts: Hosts
    folder: Path
    most: int
    checkpoint: str
    num_runs: int = 0

    def row(self, row: Row, peers: list[Peer], rounds: int) -> dict[str, list[Measured]]:
        """The runs of each peer; of one that failed, those before."""
        say(f"{row.title}")
        peers = self._fastest(row, peers)
        found: dict[str, list[Measured]] = {peer.name: [] for peer in peers}
        for number in range(rounds):
            for peer in peers if number % 2 == 0 else reversed(peers):
                if (measured := self._measure(peer, row, getattr(row, peer.images))) is not None:
                    found[peer.name].append(measured)
                    say(f"  {number + 1}  {peer.title:33} {_shown(measured)}")
        return found

    def _fastest(self, row: Row, peers: list[Peer]) -> list[Peer]:
        """Without those that another way beats in a trial. All get a run before the first that counts: modules are
        imported then, and files are in the page cache."""
        trials: dict[str, float] = {}
        for peer in peers:
            measured = self._measure(peer, row, TRIAL_IMAGES if peer.ways else 1)
            trials[peer.name] = measured.images_per_s if measured else 0.0
            if peer.ways:
                say(f"  trial  {peer.title}: {trials[peer.name]:.0f} images/s")
        best = {
            max((p for p in peers if p.ways == ways), key=lambda p: trials[p.name]) for ways in {p.ways for p in peers}
        }
        return [peer for peer in peers if not peer.ways or peer in best]

    def _measure(self, peer: Peer, row: Row, num_images: int) -> Measured | None:
        self.num_runs += 1
        wanted = -(-min(num_images, self.most) // IMAGES_PER_SHARD)
        shards = _files(self.folder)[:wanted]
        output, warm = str(self.folder / f"out-{self.num_runs}"), tuple(_files(self.folder / "warm"))
        work = Work(row, tuple(shards), output, self.checkpoint, warm)
        expected = min(len(shards) * IMAGES_PER_SHARD, self.most)
        try:
            measured = self.hosts.measure(peer.host, peer.run, work)
            if measured.num_images != expected and not measured.stages:
                raise PeerFailed(f"{measured.num_images} rows of {expected}")
        except PeerFailed as error:
            say(f"  {peer.title} FAILED: {error}")
            return None
        return measured


def _files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("bench-*.tar"))


def _shown(measured: Measured) -> str:
    if measured.stages:
        return ", ".join(f"{name[:-2]} {1000 * value:.2f}" for name, value in measured.stages.items()) + " ms an image"
    return (
        f"{measured.images_per_s:7,.0f} images/s  {measured.cpu_ms_per_image:6.2f} CPU ms  "
        f"{measured.peak_bytes / 1e6:6,.0f} MB  (started after {measured.head_s:.1f} s)"
    )


def say(text: str) -> None:
    sys.stderr.write(f"{time.monotonic() - BEGUN:4.0f} s  {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
