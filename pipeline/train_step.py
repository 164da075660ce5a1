"""Forward and backward of one rank's share of a step, micro-batch by micro-batch, up to the update.

A step is a sum over micro-batches in fixed order. All terms of the loss are means over rows, so that the mean of the losses of
micro-batches, weighted by their rows, is the loss of the batch. Random draws inside the student belong to the micro-batch: it does
not matter which rank computes it. Ranks may have different numbers of micro-batches: DistributedDataParallel averages over ranks,
and the losses are scaled so that the mean over the rows of the global batch comes out.

Shapes: B views of a rank's batch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cskd.loading.sources import Batch
from cskd.loading.targets import mixed_labels
from cskd.machine.arithmetic import autocast
from cskd.method.losses import AnyTargets, DistillationLoss, StudentOutput
from cskd.method.terms import cells_term
from cskd.pipeline.out_of_memory import Probe
from cskd.pipeline.setup import even_divisors
from cskd.pipeline.training_run import TrainingRun
from cskd.student.optim import reseed_step
from cskd.views.mix_pixels import InputMaker


class TrainStep:
    """The steps of a run. `inputs` is what an evaluation makes its images with, too."""

    def __init__(self, run: TrainingRun) -> None:
        self.run, self.criterion = run, DistillationLoss(run.config.loss, cells_term(run.config.loss))
        self.inputs = InputMaker(run.student.mean, run.student.std, run.device)
        self._net = run.network()
        self._settled = run.ranks.count == 1
        self._latest: tuple[Batch, int, int] | None = None  # what `advice` tries a part of
        self.begun: tuple[Batch, AnyTargets] | None = None  # the run's first micro-batch, till the next

    def __call__(
        self, batch: Batch, epoch: int, step: int, seconds: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One update from a batch; `step` from 0. seconds: those of 'teacher' and 'student' are added to.

        Returns: what this rank adds to the loss of the batch and to its terms, whose mean over ranks they are: detached scalars.
        """
        self._latest = batch, epoch, step
        run = self.run
        parts = micro_batches(batch, run.micro_batch)
        share = run.plan.share(run.ranks.rank)
        first, count = share.numbers.start, len(parts)
        if not self._settled:
            self._settle(parts[0])
        losses, all_terms = [], []
        for i, part in enumerate(parts):
            apart = isinstance(self._net, DistributedDataParallel) and i + 1 < count
            with self._net.no_sync() if apart else contextlib.nullcontext():  # type: ignore[operator]
                loss, terms = self._loss(self._net, part, epoch, step, first + i, seconds)
                clock = time.perf_counter()
                divisor = share.divisor(len(part["label"]))
                if divisor != 1:
                    loss, terms = loss / divisor, {name: term / divisor for name, term in terms.items()}
                if i + 1 < count:
                    run.optimisation.accumulate(loss)
                else:
                    run.optimisation.update(loss, step)
                seconds["student"] += time.perf_counter() - clock
            losses.append(loss.detach())
            all_terms.append(terms)
        if count == 1:
            return losses[0], all_terms[0]
        return torch.stack(losses).sum(), {
            name: torch.stack([t[name] for t in all_terms]).sum() for name in all_terms[0]
        }

    def _settle(self, part: Batch) -> None:
        """Have ranks average gradients, before the first step of a process: forward and backward twice, for nothing.

        First alone. What no term reaches asks for no gradient from then on, as it has none on one rank: ranks would wait for it.
        Then together. After its first backward pass DistributedDataParallel orders its buckets anew, and with three ranks or more
        the order in which sums are added up follows from them: so a run that goes on adds up as one that nothing stopped. It
        does neither where it looks for what each step does not reach.
        """
        plain, self._settled = self._net, True
        if self.run.reach_varies:
            self._net = self.run.averaging(plain)
            return
        buffers = [(buffer, buffer.clone()) for buffer in plain.buffers()]  # as batch norms have
        self._for_nothing(plain, part)
        for parameter in plain.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        self.run.optimisation.optimizer.zero_grad(set_to_none=True)
        self._net = self.run.averaging(plain)
        self._for_nothing(self._net, part)
        self.run.optimisation.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    def _for_nothing(self, net: torch.nn.Module, part: Batch) -> None:
        self.criterion.reach(self._forward(net, part)).backward()  # type: ignore[no-untyped-call]

    def _loss(
        self, net: torch.nn.Module, part: Batch, epoch: int, step: int, number: int, seconds: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and terms of a micro-batch; number: its place among those of the global batch."""
        run, clock = self.run, time.perf_counter()
        targets = run.targets.of(part, epoch, run.device)
        seconds["teacher"] += time.perf_counter() - clock
        clock = time.perf_counter()
        if number == 0:
            self.begun = (part, targets) if step == 0 else None
        reseed_step(run.config.train.seed, step, number)
        out = self._forward(net, part)
        loss, terms = self.criterion(out, mixed_labels(part, run.device), targets, epoch)
        seconds["student"] += time.perf_counter() - clock
        return loss, terms

    def _forward(self, net: torch.nn.Module, part: Batch) -> StudentOutput:
        with autocast(self.run.config.train.autocast, self.run.device):
            out: StudentOutput = net(
                self.inputs.mixed(part), self.run.views.grid if self.criterion.uses_patches else None
            )
        return out

    def advice(self, probe: Probe) -> str:
        """After a step that there was no memory for: the micro-batch that there is memory for, and the keys to set."""
        run, settings = self.run, self.run.config.train
        rows = run.micro_batch
        run.optimisation.optimizer.zero_grad(set_to_none=True)
        fits = probe(_halves(run.plan.share(run.ranks.rank).rows, rows), self._attempt)
        keys = [f"train.micro_batch={fits}" if fits else "a smaller train.micro_batch"] if rows > 2 else []
        keys += [] if settings.grad_checkpointing else ["train.grad_checkpointing=true"]
        keys += ["a smaller teacher.batch"] if run.targets.runs_teacher else []
        what = f", {fits:,} fit" if fits else ""
        return f" with {rows:,} views at once{what}; set {', or '.join([*keys, 'a smaller train.global_batch'])}"

    def _attempt(self, rows: int) -> None:
        """Forward and backward of the first `rows` views of the latest batch, on this rank alone; nothing is updated."""
        if self._latest is None:
            raise RuntimeError("no batch came yet")
        batch, epoch, step = self._latest
        try:
            part = micro_batches(batch, rows)[0]
            plain = self.run.with_projections(self.run.student)
            loss, _ = self._loss(plain, part, epoch, step, 0, dict.fromkeys(("teacher", "student"), 0.0))
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            self.run.optimisation.optimizer.zero_grad(set_to_none=True)


def micro_batches(batch: Batch, rows: int) -> list[Batch]:
    """A batch in parts of `rows` views, in order, the last of which may have fewer; `rows` is even, so that both views of a mixed
    pair are in one."""
    whole = len(batch["label"])
    if rows >= whole:
        return [batch]
    parts = [{name: t[i : i + rows] for name, t in batch.items()} for i in range(0, whole, rows)]
    return [part | {"partner": part["partner"] - i * rows} for i, part in enumerate(parts)]


def _halves(batch: int, rows: int) -> Iterator[int]:
    """Micro-batches of a rank's batch below `rows`, each at most half of the one before."""
    for n in even_divisors(batch):
        if n <= rows // 2:
            yield n
            rows = n
