"""A network of which only what comes before its stages is kept: also numbers of parts that are read and not called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cskd.teacher.stages import Stages


class Attention(nn.Module):
    """torch's attention reads the numbers of its `out_proj` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        found: Tensor = self.attention(tokens, tokens, tokens)[0]
        return found.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("names", [["block"], ["stem"], ["stem", "block"]])
def test_parts_that_are_read_and_not_called_are_kept(names: list[str]) -> None:
    torch.manual_seed(0)
    parts = {"stem": nn.Conv2d(3, 8, 4, 4), "block": Attention(), "late": nn.Conv2d(8, 5, 1)}
    net = nn.Sequential()
    for name, part in parts.items():
        net.add_module(name, part)
    x = torch.randn(2, 3, 16, 16)
    stages = Stages(net.eval(), lambda: net(x))
    with torch.no_grad():
        expected = parts["stem"](x) if names == ["stem"] else parts["block"](parts["stem"](x))
        last = parts[names[-1]]
        kept, whole = stages.truncate(names)
        with stages.seen(names, alone=True) as maps:
            net(x)
    assert torch.equal(maps[names[-1]], expected)
    needed = [parts["stem"]] if names == ["stem"] else [parts["stem"], last]
    assert kept == sum(t.numel() for part in needed for t in part.parameters()) < whole
