"""The common chains by name.

The paper's letters, and ours for what it does not have:
    M  rows of every product      K  what C = A B sums over
    N  columns of C               H  columns of E = C D
    P  columns of G = E F, the third product
    Z  batch, or experts          G  key/value heads      R  query heads per key/value head
"""

from typing import get_args

from fusion.plan.chain import Chain, DType
from fusion.plan.stages import Activation, Causal, Dim, Elementwise, Input, MatMul, Softmax, Stage


def gemm_chain(
    *,
    M: int,
    N: int,
    K: int,
    H: int | None = None,
    P: int | None = None,
    batch: int | None = None,
    activation: Activation = "identity",
    dtype: DType = "fp32",
) -> Chain:
    """C[M,N] = A[M,K] B[K,N]; with H also E[M,H] = C[M,N] D[N,H]; with P also G[M,P] = E[M,H] F[H,P].

    Args:
        M: Rows.
        N: Columns of C.
        K: Length of the first sum.
        H: Columns of E; None ends the chain at C.
        P: Columns of G; None ends the chain at E.
        batch: Size of the first dimension Z of every tensor; None leaves it out.
        activation: Applied to every value that another product reads.
        dtype: Of all tensors.

    Returns:
        The chain; its inputs are A, B, D and F.

    Raises:
        ValueError: P without H, an unknown activation or dtype, a negative size.

    Source: MCFuser (arXiv:2506.22169), Figure 3; the activation and the third product's letters are not in the paper.
    """
    if P is not None and H is None:
        raise ValueError(f"P={P} without H: give H, the columns of the second product, too")
    z = "Z" if batch is not None else ""
    inputs = [Input("A", f"{z}MK"), Input("B", f"{z}KN")]
    stages: list[Stage] = [MatMul("C", "A", "B", over="K")]
    for size, out, left, right, over, column in ((H, "E", "C", "D", "N", "H"), (P, "G", "E", "F", "H", "P")):
        if size is not None:
            inputs.append(Input(right, f"{z}{over}{column}"))
            stages += [*_activate(left, activation), MatMul(out, left, right, over=over)]
    return Chain(_dims({"Z": batch}, {"M": M, "N": N, "K": K, "H": H, "P": P}), tuple(inputs), tuple(stages), dtype)


def attention(
    *,
    M: int,
    N: int,
    K: int,
    H: int | None = None,
    batch: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    scale: float | None = None,
    mask: str | None = None,
    keep: str | None = None,
    causal: bool = False,
    diagonal: int = 0,
    dtype: DType = "fp32",
) -> Chain:
    """E = softmax(scale * A B + masks) D with A the queries, B the keys, D the values.

    Shapes are A[Z,G,M,K], B[Z,G,N,K], D[Z,G,N,H], E[Z,G,M,H]. Where query heads share key/value heads, A and E have R
    after G: split their heads by `unflatten(1, (kv_heads, heads // kv_heads))`, which is a view.

    Args:
        M: Queries.
        N: Keys.
        K: Length of a query and of a key.
        H: Length of a value; None is K.
        batch: Size of Z; None leaves it out.
        heads: Query heads; None leaves G out.
        kv_heads: Key/value heads, a divisor of `heads`; None is `heads`.
        scale: Of the scores; None is 1 / sqrt(K).
        mask: Letters of the input `mask`, which is added to the scores, e.g. "MN".
        keep: Letters of the boolean input `keep`, True = takes part, e.g. "ZN" against padded keys.
        causal: Whether query i takes part with the keys up to i + `diagonal` only.
        diagonal: N - M where the queries are the last ones of the keys (a key cache).
        dtype: Of all tensors but `keep`.

    Returns:
        The chain; its inputs are A, B, D, and as asked mask and keep. Queries without a key get zeros, as from torch.

    Raises:
        ValueError: Heads that do not divide, a diagonal without causal, letters of a mask that do not index the
            scores, an unknown dtype, a negative size.

    Source: MCFuser (arXiv:2506.22169), self-attention as a chain; masks and grouped heads are not in the paper.
    """
    if diagonal and not causal:
        raise ValueError(f"diagonal={diagonal} without causal=True, which it shifts: pass both or none")
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads is not None and (heads is None or kv_heads < 1 or heads % kv_heads):
        raise ValueError(f"kv_heads={kv_heads} must be at least 1 and divide heads={heads}")
    repeats = None if heads is None or kv_heads is None or heads == kv_heads else heads // kv_heads
    grid = {"Z": batch, "G": kv_heads, "R": repeats}
    rows = "".join(letter for letter, size in grid.items() if size is not None)
    columns = rows.replace("R", "")
    inputs = [Input("A", f"{rows}MK"), Input("B", f"{columns}NK"), Input("D", f"{columns}NH")]
    stages: list[Stage] = [MatMul("C", "A", "B", over="K")]
    stages.append(Elementwise("C", "mul", max(K, 1) ** -0.5 if scale is None else float(scale)))
    if mask is not None:
        inputs.append(Input("mask", mask))
        stages.append(Elementwise("C", "add", "mask"))
    if keep is not None:
        inputs.append(Input("keep", keep))
        stages.append(Elementwise("C", "mask", "keep"))
    if causal:
        stages.append(Causal("C", row="M", column="N", diagonal=diagonal))
    stages += [Softmax("C", over="N"), MatMul("E", "C", "D", over="N")]
    dims = _dims(grid, {"M": M, "N": N, "K": K, "H": K if H is None else H})
    return Chain(dims, tuple(inputs), tuple(stages), dtype)


def mlp(
    *,
    M: int,
    K: int,
    N: int,
    H: int | None = None,
    batch: int | None = None,
    activation: Activation = "gelu",
    gated: bool = False,
    bias: bool = False,
    residual: bool = False,
    dtype: DType = "fp32",
) -> Chain:
    """E = f(A B) D, or gated E = (f(A B) * (A B_up)) D; weights are stored as nn.Linear does, B[N,K] and D[H,N].

    Args:
        M: Rows (tokens).
        K: Length of a row.
        N: Hidden size.
        H: Length of a row of the output; None is K.
        batch: Size of the first dimension Z of every tensor (experts); None leaves it out.
        activation: f.
        gated: Whether a second product B_up multiplies the activated one.
        bias: Whether every product adds a vector: bias_C, bias_C_up, bias_E.
        residual: Whether the input residual[M,H] is added to the output.
        dtype: Of all tensors.

    Returns:
        The chain; its inputs are A, B, D, and as asked B_up, the biases and residual.

    Raises:
        ValueError: An unknown activation or dtype, a negative size.

    Source: not in the paper.
    """
    z = "Z" if batch is not None else ""
    inputs = [Input("A", f"{z}MK")]
    stages: list[Stage] = []

    def linear(out: str, left: str, weight: str, over: str, column: str) -> None:
        inputs.append(Input(weight, f"{z}{column}{over}"))
        stages.append(MatMul(out, left, weight, over=over))
        if bias:
            inputs.append(Input(f"bias_{out}", f"{z}{column}"))
            stages.append(Elementwise(out, "add", f"bias_{out}"))

    if gated:
        linear("C_up", "A", "B_up", "K", "N")
    linear("C", "A", "B", "K", "N")
    stages += _activate("C", activation)
    if gated:
        stages.append(Elementwise("C", "mul", "C_up"))
    linear("E", "C", "D", "N", "H")
    if residual:
        inputs.append(Input("residual", f"{z}MH"))
        stages.append(Elementwise("E", "add", "residual"))
    dims = _dims({"Z": batch}, {"M": M, "N": N, "K": K, "H": K if H is None else H})
    return Chain(dims, tuple(inputs), tuple(stages), dtype)


def _activate(x: str, activation: Activation) -> tuple[Stage, ...]:
    if activation not in get_args(Activation):
        raise ValueError(f"activation={activation!r} must be one of {get_args(Activation)}")
    return () if activation == "identity" else (Elementwise(x, activation),)


def _dims(batch: dict[str, int | None], loops: dict[str, int | None]) -> tuple[Dim, ...]:
    outer = tuple(Dim(letter, size, batch=True) for letter, size in batch.items() if size is not None)
    return outer + tuple(Dim(letter, size) for letter, size in loops.items() if size is not None)
