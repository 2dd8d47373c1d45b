"""Bytes on the wire, counted by the kernel: bounded with our form of messages, growing with the ranks with torch's."""

import socket

import pytest

from benchmarks.measure import ranks
from benchmarks.operator import wire

MESSAGE = {"forward": 8 * (2 * wire.WIDEST + 1), "both ways": 8 * (4 * wire.WIDEST + 1)}
ROW = 4 * (2 * wire.WIDEST + 1)


@pytest.mark.parametrize("size", [1, 100_003])
def test_a_transfer_is_counted_to_the_byte(size):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver, receiver.makefile("rb") as stream:
            before = wire.sent_bytes()
            sender.sendall(bytes(size))
            assert len(stream.read(size)) == size
            assert wire.sent_bytes() - before == size


@pytest.mark.parametrize("direction", MESSAGE)
def test_a_rank_sends_less_than_twice_our_message_however_many_they_are(direction):
    for world in wire.RANKS:
        with ranks.started(world) as run:
            sent = wire.counted(run, wire.ours, [wire.WIDEST], direction == "both ways")
        # gloo's ring sends 2 (W - 1) / W of it, and headers
        assert 2 * (world - 1) / world * MESSAGE[direction] <= sent < 2 * MESSAGE[direction]


def test_with_torchs_form_a_rank_sends_its_row_to_every_other():
    for world in wire.RANKS:
        with ranks.started(world) as run:
            sent = wire.counted(run, wire.torchs, [wire.WIDEST], False)
        assert (world - 1) * ROW <= sent < 1.05 * (world - 1) * ROW
