"""The kinds of spans and their colours, the same in Nsight Systems, in PyTorch's traces and in report.html. Nothing else; no torch.

A span's name is "kind/what": forward/spatial, copy_out/offload, step/12.
"""

# Kind -> 0xRRGGBB.
KINDS: dict[str, int] = {
    "step": 0x868E96,
    "data": 0xF08C00,
    "curate": 0x15AABF,
    "encode": 0xFCC419,
    "forward": 0x339AF0,
    "recompute": 0x9775FA,
    "backward": 0x1864AB,
    "collective": 0xE64980,
    "copy_out": 0x12B886,
    "copy_in": 0x66A80F,
    "optimizer": 0x2F9E44,
    "checkpoint": 0x495057,
}


def kind_of(name: str) -> str:
    """The kind of a span's name; "" for another program's."""
    kind, slash, _ = name.partition("/")
    return kind if slash and kind in KINDS else ""
