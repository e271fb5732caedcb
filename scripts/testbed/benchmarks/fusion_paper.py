"""MCFuser's Figure 8 as numbers: speed relative to PyTorch, read off the published picture to about 0.1.

The shapes behind the names were not to be had; those that stand for them are in fusion_shapes.py.
"""

_METHODS = {
    ("a100", "gemm"): ("Ansor", "BOLT", "MCFuser-Chimera", "MCFuser"),
    ("rtx3080", "gemm"): ("Ansor", "MCFuser-Chimera", "MCFuser"),
    ("a100", "attention"): ("Ansor", "FlashAttention", "MCFuser-Chimera", "MCFuser"),
    ("rtx3080", "attention"): ("Ansor", "FlashAttention", "MCFuser-Chimera", "MCFuser"),
}

_BARS: dict[tuple[str, str], dict[str, tuple[float | None, ...]]] = {
    ("a100", "gemm"): {
        "G1": (5.3, 3.8, 9.5, 9.5),
        "G2": (5.8, 4.4, 9.0, 9.1),
        "G3": (6.9, 8.2, 10.9, 11.4),
        "G4": (2.7, 6.2, 4.4, 5.5),
        "G5": (2.6, 5.5, 3.8, 4.4),
        "G6": (1.5, 4.3, 2.8, 3.6),
        "G7": (3.6, 5.9, 8.6, 8.3),
        "G8": (3.4, 7.7, 8.2, 8.2),
        "G9": (1.9, 6.3, 7.5, 8.5),
        "G10": (2.1, 6.7, 5.9, 5.9),
        "G11": (0.7, 0.1, 2.8, 2.8),
        "G12": (0.4, 0.1, 2.3, 2.1),
    },
    ("rtx3080", "gemm"): {
        "G1": (5.0, 6.5, 6.8),
        "G2": (6.8, 6.5, 6.8),
        "G3": (5.3, 6.6, 6.5),
        "G4": (2.7, 3.1, 3.0),
        "G5": (2.1, 2.2, 2.0),
        "G6": (1.2, 1.5, 1.6),
        "G7": (4.0, 5.0, 6.4),
        "G8": (2.3, 4.5, 3.7),
        "G9": (1.7, 3.0, 3.0),
        "G10": (1.2, 2.0, 2.5),
        "G11": (0.5, 1.3, 0.9),
        "G12": (0.3, 1.1, 1.1),
    },
    ("a100", "attention"): {
        "S1": (1.8, 2.9, 5.2, 9.3),
        "S2": (1.5, 2.8, 9.1, 9.2),
        "S3": (1.1, 2.8, 5.7, 5.7),
        "S4": (3.3, 3.1, 6.7, 6.7),
        "S5": (3.2, 1.7, 8.9, 9.2),
        "S6": (2.4, 2.0, 5.6, 6.1),
        "S7": (5.7, None, 9.9, 13.2),
        "S8": (5.7, None, 7.9, 7.0),
        "S9": (5.2, None, 5.1, 8.9),
    },
    ("rtx3080", "attention"): {
        "S1": (1.5, 2.4, 2.9, 3.0),
        "S2": (1.4, 1.1, 2.9, 2.9),
        "S3": (1.7, 1.4, 3.0, 3.0),
        "S4": (3.4, 1.0, 5.3, 5.6),
        "S5": (2.4, 1.3, 5.3, 5.3),
        "S6": (2.3, 0.9, 3.4, 3.4),
        "S7": (11.3, None, 12.7, 12.6),
        "S8": (9.1, None, 10.6, 11.1),
        "S9": (5.5, None, 5.9, 5.9),
    },
}


def bars(device: str, group: str) -> dict[str, dict[str, float]]:
    """The picture's bars of one device and group of shapes.

    Args:
        device: a100 or rtx3080; others have none.
        group: gemm or attention.

    Returns:
        Shape -> method -> speed relative to PyTorch, for the bars that there are.
    """
    methods = _METHODS.get((device, group), ())
    return {
        shape: {method: speed for method, speed in zip(methods, speeds, strict=True) if speed is not None}
        for shape, speeds in _BARS.get((device, group), {}).items()
    }
