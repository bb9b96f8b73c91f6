"""Small color images in few bytes, without loss, for a machine that has torch but no image library.

Each value is predicted from its neighbours by a linear function with integer weights, which are fitted to the images.
The differences are put into groups by the sizes of the differences around them, and zlib compresses each group by its
own Huffman code. All images are decoded together, one position after another, on a CPU or a GPU.
"""

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

CHANNELS = (1, 0, 2)  # green first: it predicts the others best
OWN = ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0))  # (down, across) of the known neighbours in the channel
OTHER = tuple((down, across) for down in (-1, 0, 1) for across in (-1, 0, 1))  # in a channel that is known as a whole
SHARES = (2, 2, 1, 1, 1, 1)  # of the differences at OWN in the size that selects the group
# Bounds of that size between the groups.
BOUNDS = (2, 4, 6, 9, 12, 15, 19, 23, 28, 33, 39, 46, 54, 63, 74, 86, 101, 119, 140, 166, 199, 245, 320)
GROUPS, TAPS, KINDS, PAD, ONE = len(BOUNDS) + 1, len(OWN) + 2 * len(OTHER) + 1, 12, 2, 1 << 14
FITTED = 1500  # images to which the weights are fitted


def pack(pixels: Tensor) -> dict[str, Tensor]:
    """Compresses pixels (images, size, size, 3) uint8 to tensors that `unpack` takes."""
    walk, planes = _Walk(pixels.shape, pixels.device), pixels.permute(3, 1, 2, 0).short()
    walk.weights = _fitted_weights(planes[..., :: -(-len(pixels) // FITTED)])
    differences, groups = [], []
    for channel, y, x in walk.positions():
        prediction, group = walk.predict(channel, y, x)
        difference = (planes[channel, y, x] - prediction).to(torch.uint8)  # modulo 256
        walk.set(channel, y, x, prediction, difference)
        differences.append(difference)
        groups.append(group)
    order = torch.cat(groups).argsort(stable=True)
    lengths = torch.cat(groups).bincount(minlength=3 * GROUPS)
    codes = [_huffman(part.numpy().tobytes()) for part in torch.cat(differences)[order].cpu().split(lengths.tolist())]
    return {
        "shape": torch.tensor(pixels.shape),
        "weights": walk.weights.short(),
        "lengths": lengths.cpu(),
        "code_lengths": torch.tensor([len(code) for code in codes]),
        "codes": torch.frombuffer(bytearray(b"".join(codes)), dtype=torch.uint8),
    }


def unpack(packed: dict[str, Tensor], device: torch.device) -> Tensor:
    """The pixels (images, size, size, 3) uint8 of `pack`, on `device`."""
    walk = _Walk(torch.Size(packed["shape"].tolist()), device)
    walk.weights = packed["weights"].to(device, torch.int32)
    codes = [
        zlib.decompress(part.numpy().tobytes(), -15) for part in packed["codes"].split(packed["code_lengths"].tolist())
    ]
    differences = torch.frombuffer(bytearray(b"".join(codes)), dtype=torch.uint8).to(device)
    start = (packed["lengths"].cumsum(0) - packed["lengths"]).to(device)  # of the rest of each group
    rows = torch.arange(walk.images, device=device)
    for channel, y, x in walk.positions():
        prediction, group = walk.predict(channel, y, x)
        sorted_group, order = group.sort(stable=True)
        number = sorted_group.bincount(minlength=len(start))
        before = number.cumsum(0) - number
        difference = torch.empty_like(rows, dtype=torch.uint8)
        difference[order] = differences[start[sorted_group] + rows - before[sorted_group]]
        start += number
        walk.set(channel, y, x, prediction, difference)
    return walk.pixels()


class _Walk:
    """The values (channel, y, x, images) and differences that are known so far, with a border of zeros."""

    weights: Tensor  # (channel, kind of position, taps) int32, in units of 1 / ONE

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.images, self.size = shape[0], shape[1]
        padded = (3, self.size + 2 * PAD, self.size + 2 * PAD, self.images)
        self.values, self.sizes = (torch.zeros(padded, dtype=torch.int16, device=device) for _ in range(2))
        self.bounds = torch.tensor(BOUNDS, dtype=torch.int16, device=device)

    def positions(self) -> Iterator[tuple[int, int, int]]:
        return ((c, y, x) for c in CHANNELS for y in range(self.size) for x in range(self.size))

    def kind(self, y: int, x: int) -> int:
        """Positions at a border lack some neighbours, and so have weights of their own."""
        return 4 * min(y, 2) + (3 if x == self.size - 1 else min(x, 2))

    def taps(self, channel: int, y: int, x: int) -> Tensor:
        """The known values (taps, images) int16 around a position, and one constant."""
        y, x, before = y + PAD, x + PAD, CHANNELS[: CHANNELS.index(channel)]
        known = [self.values[channel, y + down, x + across] for down, across in OWN]
        known += [self.values[other, y + down, x + across] for other in before for down, across in OTHER]
        return torch.stack([*known, torch.ones_like(known[0])])

    def predict(self, channel: int, y: int, x: int) -> tuple[Tensor, Tensor]:
        """The predictions (images,) int16 of a value, and the groups (images,) int64 of the differences from them."""
        taps = self.taps(channel, y, x)
        weights = self.weights[channel, self.kind(y, x), : len(taps)]
        # Integers, so that each machine computes the same.
        total = (taps.int() * weights[:, None]).sum(0, dtype=torch.int32)
        prediction = ((total + ONE // 2) >> 14).clamp(0, 255).short()
        y, x, place = y + PAD, x + PAD, CHANNELS.index(channel)
        around = sum(share * self.sizes[channel, y + d, x + a] for share, (d, a) in zip(SHARES, OWN, strict=True))
        around = around + sum(3 * self.sizes[other, y, x] for other in CHANNELS[:place])
        return prediction, torch.bucketize(around, self.bounds, right=True) + place * GROUPS

    def set(self, channel: int, y: int, x: int, prediction: Tensor, difference: Tensor) -> None:
        """Sets a value to prediction + difference modulo 256."""
        self.values[channel, y + PAD, x + PAD] = (prediction + difference) & 255
        self.sizes[channel, y + PAD, x + PAD] = torch.minimum(difference, -difference)

    def pixels(self) -> Tensor:
        inner = self.values[:, PAD : PAD + self.size, PAD : PAD + self.size]
        return inner.to(torch.uint8).permute(3, 1, 2, 0).contiguous()


def _fitted_weights(planes: Tensor) -> Tensor:
    """Weights (channel, kind, taps) of least squares on values (channel, y, x, images)."""
    walk = _Walk(torch.Size([planes.shape[-1], planes.shape[1]]), planes.device)
    walk.values[:, PAD : PAD + walk.size, PAD : PAD + walk.size] = planes
    squares = torch.zeros(3, KINDS, TAPS, TAPS, dtype=torch.float64)
    products = torch.zeros(3, KINDS, TAPS, dtype=torch.float64)
    for channel, y, x in walk.positions():
        taps, kind = walk.taps(channel, y, x).double().cpu(), walk.kind(y, x)
        squares[channel, kind, : len(taps), : len(taps)] += taps @ taps.T
        products[channel, kind, : len(taps)] += taps @ planes[channel, y, x].double().cpu()
    weights = (torch.linalg.pinv(squares, hermitian=True) @ products[..., None])[..., 0]
    return (weights * ONE).round().clamp(-(2**15), 2**15 - 1).int().to(planes.device)


def _huffman(data: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()
