"""C++ kernels of schedules in tests, and what is asked of them: as right as the unfused chain."""

from dataclasses import replace

from closeness import FUSED_FACTOR, assert_close
from fused_chains import draw_tensors, to

from fusion.emit.cpp.kernel import emit
from fusion.plan.schedule import schedule
from fusion.reference import run
from fusion.run.check import DTYPES
from fusion.run.cpp.build import target
from fusion.run.cpp.native import compile_together


def compiled(cases, instructions=None, *, exact=False, save_lse=False):
    """Kernels of (chain, expression, tiles, register block), compiled together."""
    kernels = []
    for index, (chain, expression, tiles, micro) in enumerate(cases):
        plan = replace(schedule(chain, expression, tiles), micro=micro)
        kernels.append(emit(chain, plan, exact=exact, save_lse=save_lse, suffix=f"_{index}"))
    return compile_together(kernels, instructions or target())


def assert_right(kernel, chain, tensors=None):
    """The kernel is at most twice as wrong as the unfused chain in its dtype."""
    tensors = draw_tensors(chain) if tensors is None else tensors
    own = to(tensors, DTYPES[chain.dtype])
    assert_close(str(chain), kernel(chain, own)[0], run(chain, own), run(chain, tensors), factor=FUSED_FACTOR)
