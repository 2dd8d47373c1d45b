"""How long NCCL takes for a small message, by the model with which NCCL itself chooses an algorithm.

A latency for each hop, and bytes over a bandwidth, for the protocol LL, which the model finds fastest for every message
here. Nodes of 8 GPUs that NVLink joins, InfiniBand between them, an Intel host.

Source: NCCL 2.30.7, src/graph/tuning.cc: ncclTunerConstantsDefaults, ncclTopoTuneModel and ncclTopoGetAlgoTime,
https://github.com/NVIDIA/nccl. Left out: treeCorrectionFactor, less than 1 % for messages of this size, and CollNet,
which needs switches that add. NVLS has a latency of 25 us in a node, more than any message here takes there.
"""

GPUS_PER_NODE = 8
TREE_US, RING_US = 6.8, 6.6  # before the first hop
NVLINK_US = 0.6
TREE_NET_US, RING_NET_US = 5.0, 2.7
# A hop of a ring is no faster than a network card takes a message, once there is a network in the ring
NET_OVERHEAD_US = 1.0
# In 1 node, 2 nodes, more: the row for Hopper. NCCL itself reads the host's row over nodes, for Intel 39.0 and 20.4;
# Hopper's favours the longer message, and so torch's form
LL_GB_PER_S = (141.0, 45.0, 35.0)
TREE_SHARE = 0.85  # of that bandwidth


def all_reduce_us(ranks: int, size: int) -> float:
    """Time of an all_reduce of size bytes over so many GPUs: a ring's or a tree's, whichever is less."""
    if ranks == 1:
        return 0.0
    nodes = nodes_of(ranks)
    depth = nodes.bit_length() - 1
    hops = (ranks // nodes - 1) * NVLINK_US + depth * TREE_NET_US
    tree = TREE_US + 2 * hops + 2 * size / (TREE_SHARE * bytes_per_us(nodes))
    return min(tree, ring_us(ranks, 2, size))


def all_gather_us(ranks: int, size: int) -> float:
    """Time until each of so many GPUs has the size bytes of every other: a ring's, as NCCL has no tree for it."""
    return 0.0 if ranks == 1 else ring_us(ranks, 1, ranks * size)


def ring_us(ranks: int, rounds: int, size: int) -> float:
    """Of a ring that passes size bytes, cut into a piece for each GPU, so often around."""
    nodes = nodes_of(ranks)
    nvlink = NVLINK_US if nodes == 1 else max(NVLINK_US, NET_OVERHEAD_US)
    hops = (ranks - nodes) * nvlink + (nodes - 1) * RING_NET_US
    return RING_US + rounds * (hops + (ranks - 1) / ranks * size / bytes_per_us(nodes))


def nodes_of(ranks: int) -> int:
    """Machines that so many GPUs fill."""
    if ranks <= GPUS_PER_NODE:
        return 1
    if ranks % GPUS_PER_NODE:
        raise ValueError(f"{ranks} GPUs do not fill nodes of {GPUS_PER_NODE}: give a multiple of {GPUS_PER_NODE}")
    return ranks // GPUS_PER_NODE


def bytes_per_us(nodes: int) -> float:
    return 1e3 * LL_GB_PER_S[min(nodes, 3) - 1]
