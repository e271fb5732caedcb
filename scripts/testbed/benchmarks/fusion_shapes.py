"""The chains that experiments with fusion share: MCFuser-like GEMM chains, and Chimera's attention shapes.

MCFuser's own table of shapes was not to be had. Its GEMM chains G1-G12 are given from memory and agree with how its
Figure 8 moves from one to the next, no more: call them MCFuser-like shapes. The attention shapes are those of Chimera's
published benchmark, which MCFuser is compared with; its Mixer rows are token-mixing products there, self-attention
here, as in MCFuser's figure.
"""

from fusion import Chain, attention, gemm_chain

GEMM_LABEL = "MCFuser-like shapes"
ATTENTION_LABEL = "Chimera's list"

# name -> batch, M, N, K, H
_GEMM = {
    "G1": (1, 512, 256, 64, 64),
    "G2": (1, 512, 256, 64, 128),
    "G3": (1, 512, 256, 64, 256),
    "G4": (1, 512, 512, 256, 256),
    "G5": (1, 512, 512, 512, 256),
    "G6": (1, 512, 512, 1024, 256),
    "G7": (1, 512, 512, 128, 128),
    "G8": (1, 1024, 512, 128, 128),
    "G9": (1, 2048, 512, 128, 128),
    "G10": (1, 1024, 1024, 128, 128),
    "G11": (4, 1024, 1024, 128, 128),
    "G12": (8, 1024, 1024, 128, 128),
}

# name -> heads, M, N, K, H
_ATTENTION = {
    "Bert-Small": (8, 512, 512, 64, 64),
    "Bert-Base": (12, 512, 512, 64, 64),
    "Bert-Large": (16, 512, 512, 64, 64),
    "ViT-Base/14": (12, 256, 256, 64, 64),
    "ViT-Large/14": (16, 256, 256, 64, 64),
    "ViT-Huge/14": (16, 256, 256, 80, 80),
    "ViT-Base/16": (12, 208, 208, 64, 64),
    "ViT-Large/16": (16, 208, 208, 64, 64),
    "ViT-Huge/16": (16, 208, 208, 80, 80),
    "Mixer-Small/32-S": (1, 512, 256, 64, 64),
    "Mixer-Base/32-S": (1, 768, 384, 64, 64),
    "Mixer-Large/32-S": (1, 1024, 512, 64, 64),
}

GEMM_CHAINS: dict[str, Chain] = {
    name: gemm_chain(M=M, N=N, K=K, H=H, batch=None if batch == 1 else batch, dtype="fp16")
    for name, (batch, M, N, K, H) in _GEMM.items()
}
ATTENTIONS: dict[str, Chain] = {
    name: attention(M=M, N=N, K=K, H=H, heads=None if heads == 1 else heads, dtype="fp16")
    for name, (heads, M, N, K, H) in _ATTENTION.items()
}
SHAPES: dict[str, Chain] = GEMM_CHAINS | ATTENTIONS

# MCFuser's S1-S9 stand for three families of three; that they are these rows is from memory too.
SELF_ATTENTION = {
    "S1": "Bert-Small",
    "S2": "Bert-Base",
    "S3": "Bert-Large",
    "S4": "ViT-Base/14",
    "S5": "ViT-Large/14",
    "S6": "ViT-Huge/14",
    "S7": "Mixer-Small/32-S",
    "S8": "Mixer-Base/32-S",
    "S9": "Mixer-Large/32-S",
}
