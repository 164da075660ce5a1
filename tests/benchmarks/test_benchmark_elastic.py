"""The benchmark of elastic runs tells what led to the weights, and finds nothing lost when one of two agents is killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.elastic import BATCH, EPOCH, EPOCHS, Fed, main, recording, sequence
from cskd.pipeline.train_step import TrainStep


def test_the_sequence_is_of_the_steps_that_led_to_the_weights() -> None:
    """A step that one of two ranks did alone counts for nothing, and one that was done again counts once."""
    two, one = (0, 2), (1, 1)
    run = [Fed(two, 1.0, 7, rank, step, [(step, rank)]) for step in range(4) for rank in (0, 1)]
    run += [Fed(two, 1.0, 7, 0, 4, [(4, 0)])]
    run += [Fed(one, 9.0, 8, 0, step, [(step, 0), (step, 1)]) for step in range(3, 6)]
    led, lines = sequence(run)
    assert led == {step: [(step, 0), (step, 1)] for step in range(6)}
    assert lines == [
        f"2 ranks: steps 0 .. 3 ({BATCH} views each)",
        f"1 rank: steps 3 .. 5 (3 .. 3 again, whose weights were lost; {BATCH} views each)",
    ]


def test_what_a_benchmark_records_ends_with_it(tmp_path: Path) -> None:
    plain = TrainStep.__call__
    with recording(tmp_path / "record", 0.0):
        assert TrainStep.__call__ is not plain
    assert TrainStep.__call__ is plain


@pytest.mark.slow
@pytest.mark.parametrize(("more", "stretches"), [(["--lose", "first"], 2), (["--lose", "second", "--return"], 3)])
def test_a_run_that_loses_an_agent_goes_on_by_itself(more: list[str], stretches: int, capsys: Any) -> None:
    status = main(more)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (status, found["steps"], found["stretches"]) == (0, EPOCH * EPOCHS, stretches)
    assert found["twice"] == found["lost"] == found["other"] == 0
    assert found["warnings"] == stretches - 1 and found["weights_differ_by"] < 1e-5
