"""What a schedule's kernel takes of a multiprocessor, and how many warps and stages it is run with.

Warps: as few as leave a thread no more sums than it has registers for. Stages: as many as fit, up to a cap.
"""

from dataclasses import replace

from fusion.plan.allocation import allocated_bytes
from fusion.plan.chain import Chain
from fusion.plan.device import Device
from fusion.plan.prune import loaded_operands
from fusion.plan.registers import accumulator_registers
from fusion.plan.schedule import Schedule, block

WARPS = (4, 8)  # with 16, a thread has 128 registers: compiled kernels spill more, and on sm_90 some do not compile
SUMS_OF_A_THREAD = 96  # of its 255 registers; operands, addresses and an epilogue need the rest
MAX_STAGES = {"cuda": 3, "hip": 2}


def shared_bytes(chain: Chain, schedule: Schedule, device: Device) -> int:
    """Bytes that a block keeps close: of a GPU what its kernel asks for, of a CPU all tiles that products read.

    Args:
        chain: What is computed.
        schedule: Expression, tiles, warps and stages.
        device: Where.

    Source: MCFuser (arXiv:2506.22169), rule 4 for a CPU; not in the paper for GPUs.
    """
    if device.kind == "cpu":
        tiles = dict(schedule.tiles)
        return chain.item_bytes * sum(tiles[first] * tiles[second] for first, second in loaded_operands(chain))
    return allocated_bytes(chain, schedule, device)


def pipeline(chain: Chain, schedule: Schedule, device: Device) -> tuple[int, int]:
    """Warps and stages that the kernel of a schedule is run with.

    Args:
        chain: What is computed.
        schedule: Expression and tiles; its own warps and stages do not count.
        device: Where.

    Returns:
        The fewest warps that leave a thread 96 sums or fewer, else the most; and the most stages, up to 3 on CUDA and 2
        on HIP, whose buffers fit. One warp and stage on a CPU.

    Source: our definition (the paper leaves both to its back end).
    """
    if device.kind == "cpu":
        return 1, 1
    blocks = {letter: block(tile) for letter, tile in schedule.tiles}
    sums = accumulator_registers(chain, schedule.program(chain), blocks)
    num_warps = next((w for w in WARPS if sums <= SUMS_OF_A_THREAD * w * device.warp_size), WARPS[-1])
    for num_stages in range(MAX_STAGES[device.kind], 1, -1):
        deep = replace(schedule, num_warps=num_warps, num_stages=num_stages)
        if allocated_bytes(chain, deep, device) <= device.shared_bytes_per_block:
            return num_warps, num_stages
    return num_warps, 1
