"""When a run saves a state inside an epoch, and when it stops because it was asked to: at the same step on every rank.

Ranks have clocks and signals of their own, and each step is computed together. So they ask each other, in a sum of three numbers,
about every LOOK seconds: what is agreed upon then holds for the step that is just done. How many steps lie between two looks follows
from sums, too, so that it is the same on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from cskd.config.every import Every
from cskd.machine import stops
from cskd.machine.ranks import Ranks

LOOK = 2.0  # seconds between two looks at what the ranks want
_MOST_STEPS = 1000  # between them


class Pace:
    """every: steps, or seconds of the first rank's clock since a state was saved; step: at which this process begins; clock:
    seconds, monotonic."""

    def __init__(
        self,
        every: Every,
        ranks: Ranks,
        device: torch.device,
        step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every, self._ranks, self._device, self._clock = every, ranks, device, clock
        self._saved = self._looked = clock()
        self._last, self._next = step, step + 1  # steps at which the ranks looked, and will look
        self.stop = False  # all ranks stop here

    def due(self, step: int, *, look: bool = False) -> bool:
        """Whether to save a state now that `step` updates are done; `stop` says whether to end then. All ranks ask after every step.

        look: look at what the others want, whether it is time or not.
        """
        wanted = bool(self._every.seconds) and self._clock() - self._saved >= self._every.seconds
        if self._ranks.count == 1:
            self.stop = stops.asked()
        elif look or step >= self._next:
            wanted = self._together(step, wanted)
        else:
            wanted = False
        return wanted or self.stop or bool(self._every.steps and step % self._every.steps == 0)

    def saved(self) -> None:
        """A state was saved."""
        self._saved = self._clock()

    def leave(self) -> None:
        """End this process, which was asked to, once the first rank has saved the state: SystemExit."""
        self._ranks.barrier()
        raise SystemExit(stops.EXIT)

    def _together(self, step: int, wanted: bool) -> bool:
        """Ask all ranks. Returns: whether the first one wants a state."""
        now = self._clock()
        mine = [float(wanted and self._ranks.first), float(stops.asked()), now - self._looked]
        save, stop, seconds = self._ranks.sum(torch.tensor(mine, device=self._device)).tolist()
        done, self._last, self._looked = max(1, step - self._last), step, now
        per_step = seconds / self._ranks.count / done
        self._next = step + (max(1, min(_MOST_STEPS, int(LOOK / per_step))) if per_step > 0 else 1)
        self.stop = bool(stop > 0)
        return bool(save > 0)
