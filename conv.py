"""A convolutional VAE, as an example of a model of your own:

    python train.py --model conv.py:ConvVAE --prior vamp --out DIR --batch-size 500 --lr 8e-3 \
        --epochs 30 --warmup 3
    python evaluate.py DIR --model conv.py:ConvVAE

For grey images (H, W) and colour images (H, W, 3) whose sides are divisible by four.
"""
import torch
import torch.nn.functional as F
from torch import nn

from models import VAE, GaussianHead

WIDTH = 16      # channels after the first layer


class GatedConv(nn.Module):
    """(W * x + b) sigmoid(V * x + c): (n, n_in, H, W) -> (n, n_out, H / stride, W / stride)."""

    def __init__(self, n_in, n_out, size, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(n_in, 2 * n_out, size, stride, padding=size // 2)

    def forward(self, x):
        return F.glu(self.conv(x), dim=1)


class Encoder(nn.Module):
    """Flat images (n, H W C) -> mu, logvar (n, n_out)."""

    def __init__(self, shape, n_out):
        super().__init__()
        self.shape = shape                                                      # (H, W, C)
        self.body = nn.Sequential(GatedConv(shape[2], WIDTH, 5, 2),
                                  GatedConv(WIDTH, 2 * WIDTH, 3, 2),
                                  GatedConv(2 * WIDTH, 2 * WIDTH, 3), nn.Flatten())
        self.head = GaussianHead(2 * WIDTH * shape[0] * shape[1] // 16, n_out)

    def forward(self, x):       # the channels stay last in memory, where convolutions are fastest
        return self.head(self.body(x.view(-1, *self.shape).permute(0, 3, 1, 2)))


class Decoder(nn.Module):
    """Latents (..., n_in) -> the pixels' parameters (..., n_out)."""

    def __init__(self, n_in, shape, n_out):
        super().__init__()
        self.channels, self.low = shape[2], (2 * WIDTH, shape[0] // 4, shape[1] // 4)
        self.first = nn.Linear(n_in, 2 * WIDTH * self.low[1] * self.low[2])
        self.body = nn.Sequential(      # PixelShuffle turns four channels into two by two pixels
            GatedConv(2 * WIDTH, 4 * WIDTH, 3), nn.PixelShuffle(2),
            GatedConv(WIDTH, 2 * WIDTH, 3), nn.PixelShuffle(2),
            nn.Conv2d(WIDTH // 2, n_out // (shape[0] * shape[1]), 5, padding=2))
        self.bias = nn.Parameter(torch.zeros(n_out))    # starts at the data's mean image

    def forward(self, z):
        h = self.first(z).view(-1, *self.low).contiguous(memory_format=torch.channels_last)
        x = self.body(h).unflatten(1, (-1, self.channels)).movedim(2, -1)   # (n, 1 or 2, H, W, C)
        return x.reshape(*z.shape[:-1], -1) + self.bias


class ConvVAE(VAE):
    def make_layers(self, c, n_out):
        shape = c.height, c.x_dim // c.height // c.channels, c.channels
        if shape[0] % 4 or shape[1] % 4:
            raise ValueError(f"ConvVAE needs sides that are divisible by 4, not {shape[:2]}")
        self.encoder, self.decoder = Encoder(shape, c.z_dim), nn.Identity()
        self.output = Decoder(c.z_dim, shape, n_out)
