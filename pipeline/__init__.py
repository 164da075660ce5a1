"""The two stages and inspection: one readable spine each."""

from cskd.machine.threads import wait_passively

wait_passively()  # here, since the stages load torch, which reads how threads wait once
