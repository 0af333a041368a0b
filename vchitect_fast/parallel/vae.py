"""The frozen encoders on the ranks that hold one sample together: each encodes and decodes its own frames, and its own captions.

A codec treats every frame by itself, so a rank encodes its share of them and keeps it: the model takes latents cut by frames,
and nothing is gathered in training. Sampling decodes likewise, then the first rank gathers the video, once. Captions are cut
among the ranks where there are several, and their embeddings gathered, since every rank needs all of them.
group None is one process. It caches nothing and decides nothing: which frames and which captions is the caller's.

B batch, T frames of the video, T_loc of them on this rank (perhaps none), c latent channels, h w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vchitect_fast.model.vae import Codec
from vchitect_fast.parallel.collectives import share
from vchitect_fast.shapes import CODEC_FACTOR, LATENT_CHANNELS

Text = tuple[Tensor, Tensor]  # embeddings [N,W] and pooled [P] of a caption


def own_frames(num_frames: int, group: dist.ProcessGroup | None) -> slice:
    """Which of `num_frames` frames are this rank's."""
    if group is None:
        return slice(0, num_frames)
    return share(num_frames, dist.get_world_size(group), dist.get_rank(group))


def encode_frames(codec: Codec, video: Tensor) -> Tensor:
    """`codec.encode` of a rank's frames [B,T_loc,3,H,W]; fp32 [B,T_loc,16,h,w] on the codec's device, or the video's for none.

    A frame's latents do not depend on the rank that encodes it; with SD3's codec their last bits may depend, as ever, on
    how many frames go through it at a time.
    """
    B, T_loc, _, H, W = video.shape
    if T_loc:
        return codec.encode(video)
    return video.new_empty(B, 0, LATENT_CHANNELS, H // CODEC_FACTOR, W // CODEC_FACTOR, dtype=torch.float32)


def decode_frames(codec: Codec, latents: Tensor) -> Tensor:
    """`codec.decode` of a rank's latents [B,T_loc,16,h,w]; fp32 [B,T_loc,3,8h,8w]."""
    B, T_loc, _, h, w = latents.shape
    if T_loc:
        return codec.decode(latents)
    return latents.new_empty(B, 0, 3, CODEC_FACTOR * h, CODEC_FACTOR * w, dtype=torch.float32)


def gather_frames(frames: Tensor, num_frames: int, group: dist.ProcessGroup | None) -> Tensor:
    """The ranks' frames [B,T_loc,...], any dtype, as [B,T,...] on the group's first rank; [B,0,...] on the others.

    Every rank of the group must call it.
    """
    if group is None:
        return frames
    num_ranks, first = dist.get_world_size(group), dist.get_rank(group) == 0
    sizes = [part.stop - part.start for part in (share(num_frames, num_ranks, rank) for rank in range(num_ranks))]
    mine = frames.transpose(0, 1).contiguous()  # frames first: a rank's share is one run of bytes
    whole = mine.new_empty(num_frames if first else 0, *mine.shape[1:])
    dist.all_to_all_single(
        whole, mine, sizes if first else [0] * num_ranks, [len(mine)] + [0] * (num_ranks - 1), group=group
    )
    return whole.transpose(0, 1).contiguous()


def encode_texts(encode: Callable[[str], Text], captions: Sequence[str], group: dist.ProcessGroup | None) -> list[Text]:
    """The embeddings of captions, in their order, on every rank.

    encode    gives a caption's, of one size and dtype for all, on a device that the group carries
    captions  the same list on every rank of the group, which all must call it

    Of several captions each rank encodes an equal number, and as many again where they do not divide.
    """
    num_ranks = 1 if group is None else dist.get_world_size(group)
    if num_ranks == 1 or len(captions) < 2:  # one caption is encoded sooner than sent
        return [encode(caption) for caption in captions]
    count = -(-len(captions) // num_ranks)
    begin = dist.get_rank(group) * count
    mine = [encode(captions[(begin + k) % len(captions)]) for k in range(count)]
    embeds, pooled = mine[0]
    packed = torch.stack([torch.cat((text.flatten(), vector.flatten())) for text, vector in mine])
    gathered = packed.new_empty(num_ranks * count, packed.shape[1])
    dist.all_gather(list(gathered.chunk(num_ranks)), packed, group=group)
    texts, vectors = gathered[: len(captions)].split([embeds.numel(), pooled.numel()], dim=1)
    return [(text.view_as(embeds), vector) for text, vector in zip(texts, vectors, strict=True)]
