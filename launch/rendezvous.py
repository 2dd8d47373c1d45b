"""Hold the store in which torchrun's agents meet, apart from all nodes: any of these may then be lost.

python launch/rendezvous.py [PORT], and for the agents: --rdzv-endpoint=HOST:PORT --rdzv-conf=is_host=0 --rdzv-id=train
(or PORT ID, for another id).
"""

import pickle
import signal
import sys

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

ENDS = {signal.SIGTERM, signal.SIGINT}


def hold(port: str = "29400", rdzv_id: str = "train") -> None:
    """Hold the store until a signal asks for the end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # before there are threads
    store = TCPStore("0.0.0.0", int(port), is_master=True, wait_for_workers=False)
    meeting = C10dRendezvousBackend(store, rdzv_id)
    while signal.sigtimedwait(ENDS, 1) is None:
        # Agents that end close their meeting for good: whoever comes next is to find a new one
        state, token = meeting.get_state() or (None, None)
        if state and (closed := pickle.loads(state)).closed:
            fresh = type(closed)()
            fresh.round = closed.round + 1  # what was said in a round stays in the store
            meeting.set_state(pickle.dumps(fresh), token)


if __name__ == "__main__":
    hold(*sys.argv[1:])
