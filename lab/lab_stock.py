"""Training samples that other processes draw while a model is trained on them.

    python -m lab.lab_stock --folder F --tokenizer FILE --mix '{"sheet": {"table_cell": 4}}' --worker 3

Workers write files of rows and pictures to a folder; the trainer takes them up into rings on its device and deletes
them. A step picks rows of the rings at random: shapes are static, and so are addresses, as a CUDA graph needs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lab.lab_documents import Documents, padded, pixels, width_of
from lab.lab_sample import SIZES, TRAIN
from lab.lab_tasks import NO_LABEL, Group
from lab.lab_tokens import PAD, Vocabulary

WAITING = 24  # files of a worker that nobody has taken up: then it rests
BATCHES = 2  # batches' samples of a size in a file


@dataclass
class Ring:
    """Rows of one picture size: ids, labels [N, L] i32, length [N] i64, pictures [N, pictures, 3, h, w] u8 or None;
    held [] f32: how many rows are filled; cursor: where the next goes; taken: rows that ever came.
    """

    ids: Tensor
    labels: Tensor
    length: Tensor
    pictures: Tensor | None
    held: Tensor
    cursor: int = 0
    taken: int = 0

    @staticmethod
    def of(name: str, rows: int, device: torch.device) -> "Ring":
        size, width = SIZES[name], width_of(name)
        shape = None if size is None else (rows, size.pictures, 3, size.height, size.width)
        return Ring(
            torch.full((rows, width), PAD, dtype=torch.int32, device=device),
            torch.full((rows, width), NO_LABEL, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
            None if shape is None else torch.zeros(shape, dtype=torch.uint8, device=device),
            torch.zeros((), device=device),
        )

    def take(self, file: dict[str, np.ndarray]) -> None:
        rows = len(self.length)
        place = torch.arange(self.cursor, self.cursor + len(file["length"])) % rows
        self.cursor = (self.cursor + len(place)) % rows
        place = place.to(self.length.device)
        for name, whole in (("ids", self.ids), ("labels", self.labels), ("length", self.length)):
            whole[place] = torch.from_numpy(file[name]).to(whole.device)
        if self.pictures is not None:
            self.pictures[place] = torch.from_numpy(file["pictures"]).to(place.device).view_as(self.pictures[place])
        self.taken += len(place)
        self.held.fill_(min(rows, self.taken))


class Stock:
    """Rings of every size of `mix`, `batches` batches' rows each, filled from `folder` by the processes `workers`."""

    def __init__(self, mix: dict, batches: int, folder: Path, device: torch.device):
        self.mix, self.folder, self.workers = mix, folder, list[subprocess.Popen]()
        self.rings = {name: Ring.of(name, batches * sum(tasks.values()), device) for name, tasks in mix.items()}
        folder.mkdir(parents=True, exist_ok=True)

    def batch(self) -> list[Group]:
        """A training batch; every row that is held is as likely."""
        return [self._group(name, sum(tasks.values())) for name, tasks in self.mix.items()]

    def _group(self, name: str, rows: int) -> Group:
        ring = self.rings[name]
        index = (torch.rand(rows, device=ring.length.device) * ring.held).long()
        pictures = None if ring.pictures is None else ring.pictures[index].flatten(0, 1)
        length = ring.length[index]
        return Group(name, SIZES[name], ring.ids[index].long(), ring.labels[index].long(), length, length, pictures, ())

    def refill(self, batches: int) -> int:
        """Takes up at most so many batches' files; returns how many. All are read before the first goes to the device,
        which works on meanwhile. Ends the process where a worker has ended: what is not renewed is learned by heart.
        """
        for worker in self.workers:
            if worker.poll() is not None:
                raise SystemExit(f"a process that draws samples has ended with status {worker.returncode}: see above")
        files = sorted(self.folder.glob("*.npz"), key=lambda f: f.stat().st_mtime)
        read = []
        for file in files[: batches * len(self.rings) // BATCHES]:
            with np.load(file) as content:
                read.append((file.name.split("-")[0], dict(content)))
            file.unlink()
        for name, rows in read:
            self.rings[name].take(rows)
        return len(read)

    @property
    def taken(self) -> int:
        """Rows that ever came."""
        return sum(ring.taken for ring in self.rings.values())

    def end(self) -> None:
        for worker in self.workers:
            worker.kill()

    def fill(self, share: float, seconds: float) -> None:
        """Waits until so much of every ring is held, or so long, but at least for a first file of each."""
        start = time.monotonic()
        while True:
            self.refill(64)
            held = [min(1.0, r.taken / len(r.length)) for r in self.rings.values()]
            if min(held) >= share or (min(held) > 0 and time.monotonic() - start > seconds):
                return
            time.sleep(0.05)


def start_workers(count: int, mix: dict, folder: Path, tokenizer: Path, seed: int) -> list[subprocess.Popen]:
    """So many processes that draw into `folder`; they end with the one that started them."""
    command = [sys.executable, "-m", "lab.lab_stock", "--folder", folder, "--tokenizer", tokenizer]
    command += ["--mix", json.dumps(mix)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen([*map(str, command), "--worker", str(i), "--seed", str(seed)], env=env) for i in range(count)
    ]


def draw(make: Documents, name: str, tasks: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """A file's content: samples of a size in the proportions of `tasks`."""
    samples = make.samples(name, {task: BATCHES * n for task, n in tasks.items()}, seed)
    ids, labels, _, length = padded([make.row(s, name) for s in samples], width_of(name))
    found = {"ids": ids.int().numpy(), "labels": labels.int().numpy(), "length": length.numpy()}
    return found if SIZES[name] is None else {**found, "pictures": np.stack([pixels(s) for s in samples])}


def work(options: argparse.Namespace) -> None:
    """Files by turns of every size, for ever."""
    torch.set_num_threads(1)
    make, mix = Documents(Vocabulary(options.tokenizer), TRAIN), json.loads(options.mix)
    parent, turn = os.getppid(), 0
    while os.getppid() == parent:
        if len(list(options.folder.glob(f"*-{options.worker}-*.npz"))) >= WAITING:
            time.sleep(0.05)
            continue
        for name, tasks in mix.items():
            file = options.folder / f"{name}-{options.worker}-{turn}.npz"
            seed = (options.seed << 44) + (options.worker << 32) + turn
            with file.with_suffix(".new").open("wb") as new:
                np.savez(new, **draw(make, name, tasks, seed))
            file.with_suffix(".new").replace(file)
            turn += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--mix", required=True)
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    work(parser.parse_args())


if __name__ == "__main__":
    main()
