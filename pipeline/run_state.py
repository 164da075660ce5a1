"""What a run carries from step to step next to weights and optimiser. It is kept in the resume states, so that a run that was
cut writes what it would have written: sums of the epoch so far, the best score, what changed on the way.

It also sees to it that all of it is finite: on every rank at the same step, before anything is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cskd.errors import ConfigError, NotFiniteError, StudentError
from cskd.files.weights import first_not_finite
from cskd.machine.ranks import Ranks
from cskd.method.terms import AGREEMENT
from cskd.pipeline.conflicts import change_note
from cskd.student import Student
from cskd.student.best import Best, BestWeights
from cskd.student.optim import Optimisation
from cskd.student.resume import ResumeStates, state_tensors
from cskd.teacher.model import teacher_images

PROGRESS = "progress"  # its key in `info` of a state, next to the run's identity
_CHECK_STEPS = 50  # between looks at the losses where a look costs: a transfer from the device, or a sum over ranks
_MOST_SKIPS = 30  # updates in a row whose gradients overflow: the loss scale has fallen from 2^16 far below 1
_UNSOUND = 2.0  # times the loss of a student that knows nothing: a run beyond it diverges


class RunState:
    """terms: names of the loss's terms, of which the epoch's means are logged; classes: of the data set; scaled: the loss is, for
    fp16, so that updates may be left out; weight: that of this rank in the mean over ranks, see `Share`."""

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        terms: Sequence[str],
        classes: int,
        scaled: bool = False,
        weight: float = 1.0,
    ) -> None:
        self._scaled, self._weight = scaled, weight
        self.ranks, self.terms, self.classes = ranks, terms, classes
        self.best: Best | None = None  # of whole epochs
        self.shown: Best | None = None  # of an epoch that `max_steps` cut, too: what is exported
        self.changes: list[dict[str, Any]] = []  # key, old, new, step: of resumes
        self.notes: list[str] = []  # of restoring
        self._losses = torch.zeros(1 + len(terms), device=device)  # this rank's sums over the epoch so far
        self._none = torch.zeros((), device=device)  # of a term that a method does not have
        self._shown_loss = torch.full((1,), math.nan, pin_memory=device.type == "cuda")  # what a line shows next
        self._counted, self._seconds, self._clock = 0, 0.0, time.perf_counter()
        self._forwards, self._forwards_before = 0, teacher_images()  # by earlier processes; of this one before it began
        self._skipped = torch.zeros((), device=device)  # updates of the epoch so far that fp16 left out
        self._skips_in_row = 0
        self._recent: list[Tensor] = []  # losses of the steps since they were last looked at
        self._recent_skips: list[Tensor] = []  # whether their updates were left out; empty where that can't be
        self._first: float | None = None  # loss of the run's first step, mean over ranks
        self.resumed: int | None = None  # the state that this process went on from
        self.saved: int | None = None  # the newest state
        self.good: int | None = None  # the newest state whose next loss was sound
        self.step = 0  # the latest
        self._checked = -1  # the step after which all was seen to be finite
        self._every = 1 if device.type == "cpu" and ranks.count == 1 else _CHECK_STEPS

    def restore(self, record: Any, step: int, steps_per_epoch: int) -> None:
        """Go on from the record in a state of `step`; one of an earlier version has none. StudentError for another's."""
        self.step = self.resumed = self.saved = step
        try:
            self._restore(record or {}, step % steps_per_epoch)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as e:
            raise StudentError(f"the state of step {step} has a record that is none ({e}); remove the state") from None
        if step % steps_per_epoch != self._counted:
            self.notes.append(
                f"the state of step {step} has no sums of its epoch, as those of earlier versions: the losses of epoch "
                f"{step // steps_per_epoch} will be means over its remaining steps"
            )

    def _restore(self, record: dict[str, Any], steps: int) -> None:
        self.best, self.shown = Best.of(record.get("best")), Best.of(record.get("shown"))
        self.changes = [{name: c[name] for name in _CHANGE} for c in record.get("changes", [])]
        self._forwards = int(record.get("teacher_forwards", 0))
        first, good = record.get("first_loss"), record.get("good")
        self._first, self.good = None if first is None else float(first), None if good is None else int(good)
        rows = record.get("losses", [])
        if record.get("counted") == steps and all(len(row) == len(self._losses) for row in rows):
            same = len(rows) == self.ranks.count
            self._losses.copy_(torch.tensor(rows[self.ranks.rank] if same else _mean(rows)))
            self._counted, self._seconds = steps, float(record["seconds"])
            self._skipped.fill_(int(record.get("skipped", 0)))

    def change(self, changes: Sequence[tuple[str, Any, Any]], step: int, finished: bool = False) -> None:
        """What may change when a run is resumed did, at `step`. Scores from before may not be compared with those after."""
        if finished:
            said = "the run is finished, so that {} changes nothing"
            self.notes += [said.format(f"{key} = {new} in place of {old}") for key, old, new in changes]
            return
        self.changes += [{"key": key, "old": old, "new": new, "step": step} for key, old, new in changes]
        if {"train.best", "val"} & {key for key, *_ in changes}:
            self.best = self.shown = None

    def forget_lost_best(self, files: BestWeights) -> None:
        """Forget a best whose weights are not there any more, and say so."""
        for best in {self.best, self.shown} - {None}:
            if best is not None and not files.holds(best):
                lost = files.path(best)
                self.notes.append(f"{lost} is missing or damaged: the best by {best.name} counts from here on")
                self.best = self.shown = None

    def said(self, first: int = 0, stop: int | None = None) -> list[str]:
        """The changes of steps first .. stop-1 in words."""
        made = [c for c in self.changes if first <= c["step"] and (stop is None or c["step"] < stop)]
        return [change_note(**c) for c in made]

    def begin(self) -> None:
        """An epoch begins, or goes on in this process."""
        self._clock = time.perf_counter()

    def add(self, loss: Tensor, terms: dict[str, Tensor], step: int, skipped: Tensor | None = None) -> None:
        """What this rank adds to the loss of one step; `step` updates are done with it. NotFiniteError where it is time to look.

        skipped: whether the update was left out, the same on all ranks, see `Optimisation`: then its loss counts in no mean.
        """
        values = (loss.detach(), *(terms.get(name, self._none) for name in self.terms))
        sums = torch.stack(values)
        if skipped is not None:
            sums = torch.where(skipped > 0, 0.0, sums)
            self._skipped += skipped
            self._recent_skips.append(skipped)
        self._losses += sums
        self._counted, self.step = self._counted + 1, step
        self._recent.append(values[0])
        if len(self._recent) >= self._every:
            self._look(step)

    def check(self, step: int, student: Student, optimisation: Optimisation) -> None:
        """NotFiniteError on every rank unless all losses so far, weights, averages and the optimiser's tensors are finite."""
        if self._checked == step:
            return
        self._look(step)
        odd = first_not_finite(state_tensors(student, optimisation))
        if self.ranks.sum(torch.tensor(float(odd is not None), device=self._losses.device)).item():
            raise NotFiniteError(f"{odd or 'a tensor of another rank'} is not finite", _RESUME, step)
        self._checked = step

    def _look(self, step: int) -> None:
        if not self._recent:
            return
        losses = (self.ranks.sum(torch.stack(self._recent)) / self.ranks.count).tolist()
        skips = torch.stack(self._recent_skips).tolist() if self._recent_skips else [0.0] * len(losses)
        self._recent.clear()
        self._recent_skips.clear()
        for n, (loss, skipped) in enumerate(zip(losses, skips, strict=True), step - len(losses) + 1):
            self._skips_in_row = self._skips_in_row + 1 if skipped else 0
            if self._skips_in_row > _MOST_SKIPS:
                raise NotFiniteError(
                    f"gradients overflow fp16 in {self._skips_in_row} steps in a row, the last", _RESUME, n
                )
            if skipped and not math.isfinite(loss):
                continue  # overflowed in the forward pass: no weight has changed
            if not math.isfinite(loss):
                raise NotFiniteError(f"the loss is {loss}", _RESUME, n)
            if n == 1 or (self._scaled and self._first is None):
                self._first = loss
            if n - 1 == self.saved and self._sound(loss):
                self.good = self.saved

    def _sound(self, loss: float) -> bool:
        """Whether a loss is not far above that of a student that knows nothing, or of the run's first step."""
        return self._first is None or loss <= _UNSOUND * max(self._first, math.log(self.classes))

    @property
    def teacher_forwards(self) -> int:
        """Images through the teachers of all ranks since the run began. All ranks ask together."""
        return self._forwards + self.ranks.total(teacher_images() - self._forwards_before, self._losses.device)

    def mean_loss(self) -> str:
        """Of this rank's epoch so far, for a line of progress; of a CUDA device what it had computed by the line before, since to
        wait for the newest would leave it without work."""
        behind = self._losses.device.type == "cuda" and not math.isnan(self._shown_loss.item())
        shown = self._shown_loss.item() if behind else 0.0
        taken = (self._counted - self._skipped).clamp(min=1) * self._weight
        self._shown_loss.copy_(self._losses[:1] / taken, non_blocking=behind)
        return f"{shown if behind else self._shown_loss.item():.3f}"

    def row(self) -> dict[str, float]:
        """Means of the epoch so far over steps and ranks: 'loss', one a term, and 'agreement' where cells are taught; in fp16 over
        the steps that were not left out, and how many were. All ranks ask together."""
        skipped = int(self._skipped)
        means = (self.ranks.sum(self._losses.clone()) / self.ranks.count / max(1, self._counted - skipped)).tolist()
        names = (name if name == AGREEMENT else f"loss_{name}" for name in self.terms)
        row = dict(zip(("loss", *names), means, strict=True))
        return row | ({"skipped_steps": skipped} if self._scaled else {})

    @property
    def seconds(self) -> float:
        """Of this epoch so far, in all processes that worked on it."""
        return self._seconds + time.perf_counter() - self._clock

    def end(self, scored: bool) -> None:
        """An epoch is over and written down. scored: its score counts, as it does where nothing stops the run."""
        if scored:
            self.best = self.shown
        self._losses.zero_()
        self._skipped.zero_()
        self._counted, self._seconds, self._clock = 0, 0.0, time.perf_counter()

    def record(self) -> dict[str, Any]:
        """What `restore` takes, plain JSON. All ranks ask together."""
        rows = self._losses.new_zeros(self.ranks.count, len(self._losses))
        rows[self.ranks.rank] = self._losses
        return {
            "losses": self.ranks.sum(rows).tolist(),
            "counted": self._counted,
            **({"skipped": int(self._skipped)} if self._scaled else {}),
            "seconds": self.seconds if self._counted else 0.0,
            "teacher_forwards": self.teacher_forwards,
            "first_loss": self._first,
            "good": self.good,
            "best": self.best.record() if self.best else None,
            "shown": self.shown.record() if self.shown else None,
            "changes": self.changes,
        }


_CHANGE = ("key", "old", "new", "step")
_RESUME = "resume from the last state that is finite"


def _mean(rows: list[list[float]]) -> list[float]:
    """Of the ranks' sums: what each of another number of ranks goes on with, so that their mean is that of all."""
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def named_bests(states: ResumeStates) -> list[Best]:
    """The bests whose weights a state needs."""
    records = [info.get(PROGRESS) for info in states.infos().values()]
    found = [Best.of(record.get(name)) for record in records if isinstance(record, dict) for name in ("best", "shown")]
    return [best for best in found if best is not None]


def stopped(
    error: NotFiniteError, state: RunState, states: ResumeStates, lr: float, clip_grad: float | None
) -> ConfigError:
    """A run that is no longer finite stops with what helps.

    A state whose next loss was NaN, or far above the first, leads there again at any learning rate, for its weights give
    that loss: so it is set aside, and the run goes on from the newest that led to a sound loss.
    """
    step = error.step or state.step
    what = f"{error.what} at step {step}"
    if not state.ranks.first:
        return ConfigError(f"{what}; rank 0 says what helps")
    there = list(states.infos())
    good = -1 if state.good is None else state.good
    again = state.resumed is not None and step == state.resumed + 1  # its update goes wrong, too
    left = [s for s in there if s <= good and not (again and s == state.resumed)]
    lower = f"--set train.lr={lr / 10:g} or --set train.clip_grad={1 if clip_grad is None else clip_grad / 10:g}"
    if not there:
        return ConfigError(f"{what}, before a state was saved; start again with {lower}")
    if not left:
        then = "run the same command" if again else f"start again with {lower}"  # these weights are another setting's
        return ConfigError(f"{what}, and no state in {states.folder} led to anything else; remove it and {then}")
    states.set_aside(set(there) - set(left))
    gone = f" (later ones set aside: {len(there) - len(left)})" if len(left) < len(there) else ""
    return ConfigError(f"{what}; the same command with {lower} goes on from the state of step {left[0]}{gone}")
