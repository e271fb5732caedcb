"""The papers' formulas for memory, in elements: equations 1-6, and what figure 10 really plots.

Legend: B tokens, M model width, H hidden width, E experts, n chunks; one expert on each device.
"""


def states(width: int, hidden: int, num_experts: int) -> int:
    """Parameters, gradients and Adam's moments of one expert and the gate (equation 1).

    Args:
        width: M.
        hidden: H.
        num_experts: E.
    """
    return 4 * (num_experts * width + 2 * hidden * width)


def activations(num_tokens: int, width: int, hidden: int) -> int:
    """T_I, T_DI, T_M, T_DO and T_O (equation 2).

    Args:
        num_tokens: B.
        width: M.
        hidden: H.
    """
    return num_tokens * (4 * width + hidden)


def sequential_buffers(num_tokens: int, width: int, hidden: int) -> int:
    """Two neighbouring gradients (equation 3).

    Args:
        num_tokens: B.
        width: M.
        hidden: H.
    """
    return num_tokens * (width + hidden)


def saved_by_reuse(num_tokens: int, width: int, hidden: int, num_chunks: int) -> float:
    """What shared buffers save of the activations, and again of the gradients (equation 5).

    Args:
        num_tokens: B.
        width: M.
        hidden: H.
        num_chunks: n.
    """
    return num_tokens * (2 * width * (num_chunks - 2) + hidden * (num_chunks - 1)) / num_chunks


def saving_ratio(num_tokens: int, width: int, hidden: int, num_experts: int, num_chunks: int) -> float:
    """Share of all memory that reuse saves: two buffers for T_DI and for T_DO, one for T_M (equation 6).

    Args:
        num_tokens: B.
        width: M.
        hidden: H.
        num_experts: E.
        num_chunks: n.
    """
    whole = states(width, hidden, num_experts) + 2 * activations(num_tokens, width, hidden)
    return 2 * saved_by_reuse(num_tokens, width, hidden, num_chunks) / whole


def single_buffer_saving_ratio(num_tokens: int, width: int, num_chunks: int) -> float:
    """The same with one buffer for each, H = 4M and no gate: the bars of figure 10.

    Args:
        num_tokens: B.
        width: M.
        num_chunks: n.
    """
    return 6 * (1 - 1 / num_chunks) / (8 + 16 * width / num_tokens)
