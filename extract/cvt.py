"""CvT: convolutions embed the patches and project queries, keys and values (Wu et al. 2021)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

EPS = 1e-5  # of every LayerNorm
MLP_RATIO = 4
PATCHES = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding of each stage's embedding


class CvT(nn.Module):
    """Three stages of tokens on ever coarser grids; the last one has a class token too.

    The parameters have the names of the authors' code, so that their files load. As in theirs,
    the classifier sees the class token after the final norm: a backbone's pooled features are
    that token. Drop path, which only training uses, is left out.

    Reference: Wu et al., ICCV 2021, https://arxiv.org/abs/2103.15808
    """

    def __init__(
        self,
        dims: tuple[int, int, int],
        heads: tuple[int, int, int],
        depths: tuple[int, int, int],
        classes: int,
    ) -> None:
        """Draw its weights as torch does.

        Args:
            dims: of the tokens, by stage.
            heads: of the attention, by stage; each divides its ``dims``.
            depths: blocks, by stage.
            classes: of the classifier.
        """
        super().__init__()
        self.stage0 = Stage(3, dims[0], heads[0], depths[0], PATCHES[0])
        self.stage1 = Stage(dims[0], dims[1], heads[1], depths[1], PATCHES[1])
        self.stage2 = Stage(dims[1], dims[2], heads[2], depths[2], PATCHES[2], class_token=True)
        self.norm = nn.LayerNorm(dims[2], eps=EPS)
        self.head: nn.Module = nn.Linear(dims[2], classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the tokens (B, 1 + T, C) of images (B, 3, S, S): the class token, the patches.

        The T patch tokens are the rows of a grid of stride 16, 24 x 24 at 384 px.
        """
        tokens: Tensor = self.norm(self.stage2(self.stage1(self.stage0(images))))
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes), or (B, C) of the class token if the head is taken off."""
        logits: Tensor = self.head(self.forward_features(images)[:, 0])
        return logits


class Stage(nn.Module):
    """A map becomes tokens, which pass through blocks.

    It gives a map (B, C, H, W) again, or with a class token the tokens (B, 1 + H * W, C).
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        heads: int,
        depth: int,
        patch: tuple[int, int, int],
        *,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(channels, dim, patch)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim)) if class_token else None

    def forward(self, images: Tensor) -> Tensor:
        """Return what the class says, of a map (B, channels, H, W)."""
        embedded = self.patch_embed(images)
        grid = tuple(embedded.shape[2:])
        tokens = as_tokens(embedded)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens, grid)
        return tokens if self.cls_token is not None else as_map(tokens, grid)


class PatchEmbed(nn.Module):
    """Overlapping patches of a map -> a coarser map (B, dim, H, W), each place of it normalised."""

    def __init__(self, channels: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        kernel, stride, padding = patch
        self.proj = nn.Conv2d(channels, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, images: Tensor) -> Tensor:
        """Return the map of a map (B, channels, H, W)."""
        places: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return places.permute(0, 3, 1, 2)


class Block(nn.Module):
    """Attention and an MLP, each on normalised tokens and added to them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = ConvAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the tokens (B, P + H * W, C) after the block; ``grid`` is (H, W)."""
        tokens = tokens + self.attn(self.norm1(tokens), grid)
        changed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return changed


class ConvAttention(nn.Module):
    """Attention between tokens whose neighbourhood a convolution has looked at.

    Keys and values are of every second place of the grid. A class token takes part in the
    attention, but has no neighbours and so skips the convolution.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = dim**-0.5  # of all heads together, as in the authors' code; usual is of one
        self.conv_proj_q = ConvProjection(dim, stride=1)
        self.conv_proj_k = ConvProjection(dim, stride=2)
        self.conv_proj_v = ConvProjection(dim, stride=2)
        self.proj_q = nn.Linear(dim, dim)
        self.proj_k = nn.Linear(dim, dim)
        self.proj_v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return what each of the tokens (B, P + H * W, C) takes from all; ``grid`` is (H, W)."""
        prefix = tokens.shape[1] - grid[0] * grid[1]
        first, patches = tokens[:, :prefix], as_map(tokens[:, prefix:], grid)
        queries, keys, values = (
            linear(torch.cat([first, convolve(patches)], 1)).unflatten(2, (self.heads, -1))
            for linear, convolve in (
                (self.proj_q, self.conv_proj_q),
                (self.proj_k, self.conv_proj_k),
                (self.proj_v, self.conv_proj_v),
            )
        )
        taken = scaled_dot_product_attention(
            queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), scale=self.scale
        )
        projected: Tensor = self.proj(taken.transpose(1, 2).flatten(2))
        return projected


class ConvProjection(nn.Module):
    """A convolution of each channel by itself, and BatchNorm: a map -> tokens (B, T, C)."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, patches: Tensor) -> Tensor:
        """Return the tokens of a map (B, C, H, W)."""
        return as_tokens(self.bn(self.conv(patches)))


class Mlp(nn.Module):
    """Two linear layers with QuickGELU, x * sigmoid(1.702 x), between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the tokens (B, T, C) after both layers."""
        hidden = self.fc1(tokens)
        changed: Tensor = self.fc2(hidden * torch.sigmoid(1.702 * hidden))
        return changed


def as_tokens(maps: Tensor) -> Tensor:
    """Return a map (B, C, H, W) as tokens (B, H * W, C), row by row."""
    return maps.flatten(2).transpose(1, 2)


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return tokens (B, H * W, C) as a map (B, C, H, W)."""
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *grid)


def cvt_w24(classes: int = 1000) -> CvT:
    """Return CvT-w24: 276 million parameters and a classifier."""
    return CvT((192, 768, 1024), (3, 12, 16), (2, 2, 20), classes)
