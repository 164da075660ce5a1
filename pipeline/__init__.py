"""The stages, one readable spine each, and the commands that show a cache (`look`) or check and mend it (`care`)."""

from cskd.machine.threads import wait_passively

wait_passively()  # here, since the stages load torch, which reads how threads wait once
