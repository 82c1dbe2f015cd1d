"""What a step of training computes: of which records, in which rows, and the batches that a loader makes of them.

    record files --Rows--> rows, numbered through all files --Steps--> micro-batches of each step --DataLoader--> Batch
"""

import functools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from data import (
    IGNORED,
    Batch,
    Dataset,
    Files,
    ImageCache,
    ImageFolder,
    Record,
    Records,
    check,
    collate,
    order,
    shared_rows,
)
from processes import Processes
from tokenizer import Template, Tokenizer


class Rows(Dataset):
    """What a data loader asks for: rows of records of several files. A mistake is handed on as one."""

    def __init__(
        self,
        files: Sequence[str],
        images: ImageFolder | ImageCache,
        tokenizer: Tokenizer,
        template: Template,
        image_positions: int,
        max_length: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        """ValueError where a record is wrong or lacks its image."""
        super().__init__(Files([Records(file) for file in files]), images, tokenizer, template, max_length)
        self.checked = [check(file, Record, images.find, progress) for file in self.records.files]
        self.image_positions = image_positions

    def __getitem__(self, row: tuple[int, ...]):
        try:
            return super().__getitem__(row)
        except (ValueError, OSError) as error:  # a loader's process would wrap it into its traceback
            return error

    def collate(self, items: list) -> Batch | Exception:
        errors = [item for item in items if isinstance(item, Exception)]
        return errors[0] if errors else collate(items, self.image_positions)

    def ids(self, rows) -> list:
        return [self.records[number]["id"] for row in rows for number in row]


class Steps:
    """Which records each step takes, and in which rows, from its arguments and the step alone.

    batch_size: records in a step, of all processes together; micro_batch: rows in a forward pass of one; max_shared:
    records behind one prefix; even: as many forward passes in all processes, some of them of `NOTHING`.
    """

    def __init__(
        self,
        rows: Rows,
        processes: Processes,
        *,
        batch_size: int,
        micro_batch: int,
        max_shared: int,
        epochs: float,
        max_steps: int,
        seed: int,
        workers: int = 0,
        even: bool = False,
    ):
        self.dataset, self.processes, self.seed, self.workers, self.even = rows, processes, seed, workers, even
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.rows = shared_rows(np.concatenate([checked.keys for checked in rows.checked]), max_shared)
        self.lengths = np.concatenate([checked.lengths for checked in rows.checked])
        self.row_of = np.empty(len(rows), dtype=np.int64)
        for number, row in enumerate(self.rows):
            self.row_of[row] = number
        if max(batch_size, processes.count) > len(rows):
            sizes = f"batches of {batch_size} and {processes.count} processes"
            raise ValueError(f"{len(rows)} records are too few for {sizes}")
        self.per_epoch = math.ceil(len(rows) / batch_size)
        self.count = math.ceil(epochs * self.per_epoch)
        self.count = min(self.count, max_steps or self.count)
        self.waited = 0.0  # seconds that this process has waited for batches

    @functools.lru_cache(maxsize=2)  # noqa: B019 (the loader is an epoch ahead at most; there is one object)
    def order(self, epoch: int) -> np.ndarray:
        """The records of an epoch; those that share a prefix stand together."""
        return np.concatenate([self.rows[row] for row in order(len(self.rows), self.seed, epoch)])

    def micro_batches(self, step: int) -> list[list[tuple[int, ...]]]:
        """This process's share of a step: of each forward pass the rows, of each row the records.

        Rows of about the same length go together, so that less is padding: of the phantom's stages 0 and 1, reports
        beside short answers, some 30 % of all positions were, with this 9 %.
        """
        epoch, index = divmod(step, self.per_epoch)
        numbers = self.order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        borders = np.flatnonzero(np.diff(self.row_of[numbers])) + 1
        rows = [tuple(row.tolist()) for row in np.split(numbers, borders)]
        rows.sort(key=lambda row: self.lengths[list(row)].sum())
        mine = rows[self.processes.rank :: self.processes.count]
        most = len(rows[:: self.processes.count]) if self.even else len(mine)  # the first process has most
        return [mine[first : first + self.micro_batch] for first in range(0, most, self.micro_batch)]

    def batches(self, first: int) -> Iterator[tuple[int, list[tuple[list, Batch]]]]:
        """(step, [(rows, Batch), …]) of every step from `first` on; ValueError or OSError of a record."""
        plan = (micro for step in range(first, self.count) for micro in self.micro_batches(step))
        options = dict(collate_fn=self.dataset.collate, num_workers=self.workers, worker_init_fn=_obey)
        loader = iter(DataLoader(self.dataset, batch_sampler=plan, **options))
        for step in range(first, self.count):
            begin = time.monotonic()
            found = [(micro, next(loader)) for micro in self.micro_batches(step)]
            self.waited += time.monotonic() - begin
            for _, batch in found:
                if isinstance(batch, Exception):
                    raise batch
            if self.even:
                found = [(micro, batch if len(batch.ids) else NOTHING) for micro, batch in found]
            yield step, [(micro, batch) for micro, batch in found if len(batch.ids)]


# two positions of padding: no label, no loss, no gradient but zeros
NOTHING = Batch(*torch.tensor([[[0, 0]], [[IGNORED, IGNORED]], [[-1, -1]], [[0, 1]]]), [None], 0, 0)


def _obey(worker: int):
    """Ctrl-C and SIGTERM, which reach all processes, are for the one that trains: when that ends, a loader does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
