"""Operations on the geometry and the colours of images, each image with its own parameters.

Pure functions of float32 images (B, 3, S, S) in [0, 1], each equal to torchvision's at equal parameters. Nothing here
waits for the device: no tensor's value reaches Python, and no constant is copied from the host.
"""

import torch
from torch import Tensor
from torch.nn import functional

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, rounded as torchvision rounds it
_OUTSIDE = 3.0  # a coordinate where bilinear sampling of [-1, 1] finds nothing, at any size


def rotation(degrees: Tensor) -> Tensor:
    """Matrices (B, 3, 3) for `warp` that turn what is seen anticlockwise about the centre, by `degrees` (B,)."""
    angle = torch.deg2rad(degrees)
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=1).view(-1, 3, 3)


def shear_and_move(shear_x: Tensor, shear_y: Tensor, right: Tensor, down: Tensor, size: int) -> Tensor:
    """Matrices (B, 3, 3) for `warp` that shear what is seen, or move it by pixels; all are (B,), of `size` pixels.

    A shear's x is the tangent of the angle by which columns lean to the left, while the top row stays; y likewise, of
    rows, while the left column stays. As in torchvision's policies, which lean and stay so.
    """
    zero, one = torch.zeros_like(right), torch.ones_like(right)
    x, y = shear_x - right * (2 / size), shear_y - down * (2 / size)
    return torch.stack([one, shear_x, x, shear_y, one, y, zero, zero, one], dim=1).view(-1, 3, 3)


def perspective(moves: Tensor, size: int) -> Tensor:
    """Matrices (B, 3, 3) for `warp` that move the corners of what is seen inwards by `moves` (B, 4, 2): x, y in pixels.

    The corners are top left, top right, bottom right and bottom left, at 0 and size - 1 as in torchvision's
    `perspective`. The homography from a quadrilateral to a square (Heckbert 1989) is written in cross products, which
    join two points to a line and meet two lines in a point, so there is no linear system to solve. Where three corners
    lie on one line there is none, and the matrix need not be finite; `warp` takes it all the same.
    """
    corner = torch.arange(4, device=moves.device)
    far = torch.stack([(corner == 1) | (corner == 2), corner >= 2], dim=1).float()  # (4, 2): is x, y at size - 1?
    width = 2 * (size - 1) / size  # from corner to corner, in the coordinates of `warp`, the first corner being at -1
    corners = far * width - 1 + moves * (1 - 2 * far) * (2 / size)
    points = torch.cat([corners, torch.ones_like(corners[..., :1])], dim=2)
    edges = torch.linalg.cross(points, points.roll(-1, dims=1))  # top, right, bottom, left
    vanishing = torch.linalg.cross(edges[:, :2], edges[:, 2:])  # where opposite edges meet
    horizon = torch.linalg.cross(vanishing[:, :1], vanishing[:, 1:])
    # x is 0 on the left edge and 1 at the top right corner; y is 0 on the top edge and 1 at the bottom left corner.
    zero, one = edges.roll(1, dims=1)[:, :2], points[:, 1::2]
    unit = zero * ((horizon * one).sum(2, keepdim=True) / (zero * one).sum(2, keepdim=True))
    return torch.cat([unit * width - horizon, horizon], dim=1)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Matrices (B, 3, 3) for `warp` that do in one sampling what `first` and then `second` do."""
    return (first[..., None] * second[:, None]).sum(2)  # no matmul: autocast or TF32 would round it to few bits


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """`images` (B, 3, S, S) seen through homographies (B, 3, 3), sampled bilinearly, black where nothing is seen.

    A matrix takes a point (x, y, 1) of the result to its source; the image covers [-1, 1] in both directions. As in
    torchvision's `rotate` and `perspective` with fill=None, the border blends into the black.
    """
    size = images.shape[-1]
    centres = (torch.arange(size, device=images.device) * 2 + 1) / size - 1
    x_part = matrix[..., 0, None] * centres + matrix[..., 2, None]
    y_part = matrix[..., 1, None] * centres
    sources = x_part[..., None, :] + y_part[..., None]  # (B, 3, S, S)
    grid = (sources[:, :2] / sources[:, 2:]).nan_to_num_(nan=_OUTSIDE).clamp_(-_OUTSIDE, _OUTSIDE)
    return functional.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode="zeros", align_corners=False)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """`images` (B, 3, S, S) blended with black: `factor` (B,) 0 is black, 1 the image; as in torchvision."""
    return (images * per_image(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """`images` (B, 3, S, S) blended with their mean grey: `factor` (B,) 0 is grey, 1 the image; as in torchvision."""
    factor, mean = per_image(factor), per_image(_grey(images.mean((2, 3))))
    return (images * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """`images` (B, 3, S, S) blended with their grey images: `factor` (B,) 0 is grey, 1 the image; as in torchvision."""
    factor = per_image(factor)
    return (images * factor).add_(_grey(images)[:, None].mul_(1 - factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """`images` (B, 3, S, S) with the hue of HSV shifted by `turns` (B,) of the colour wheel; equals torchvision's.

    Value and saturation stay, so each channel is low + chroma * wave(hue), and HSV need not be computed in full.
    """
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    chroma = high - low
    # torch.lerp by 0 or 1 chooses as torch.where does, 4x faster on a CPU.
    is_red, is_green = (red == high).float(), (green == high).float()
    sixths = torch.lerp((red - green).add_(chroma, alpha=4), (blue - red).add_(chroma, alpha=2), is_green)
    sixths = torch.lerp(sixths, green - blue, is_red).div_(chroma.clamp_min(1e-12))  # the hue, in [-1, 5]
    # A channel's wave, by sixths of a turn from its own hue, has period 6: 1 up to 1, down to 0 at 2, up from 4 to 5.
    offset = -2 * torch.arange(3, device=images.device)  # -2 and -4: 4 and 2 sixths, for green and blue
    offset = (6 * turns[:, None] + offset + 5).remainder_(6).sub_(5)  # so that the sum below stays in [-6, 6]
    wave = (sixths[:, None] + offset[..., None, None]).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
    return torch.addcmul(low[:, None], chroma[:, None], wave)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """`images` (B, 3, S, S) blended with their blurred images: `factor` (B,) 0 is blurred, 1 the image; as in torchvision.

    A blurred pixel is the mean of 3 x 3 pixels, in which it counts five times. The outermost pixels stay.
    """
    inner = images[..., 1:-1, 1:-1]
    rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]  # a third of avg_pool2d's time on a CPU
    blurred = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(inner, alpha=4).div_(13)
    result = images.clone()
    result[..., 1:-1, 1:-1] = torch.lerp(blurred, inner, per_image(factor)).clamp_(0, 1)
    return result


def posterize(images: Tensor, step: Tensor) -> Tensor:
    """`images` (B, 3, S, S) in levels of 0, `step`, 2 * `step` ... of 255, (B,); as torchvision's of 8 - log2(step) bits."""
    step = per_image(step)
    return (_levels(images) / step).floor_().mul_(step / 255)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """`images` (B, 3, S, S) inverted where they are not below `threshold` (B,); equals torchvision's."""
    return torch.where(images >= per_image(threshold), 1 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """`images` (B, 3, S, S) with each channel stretched to [0, 1], where it has two values; equals torchvision's."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = high == low
    return (images - low.masked_fill(flat, 0)).div_((high - low).masked_fill_(flat, 1))


def equalize(images: Tensor) -> Tensor:
    """`images` (B, 3, S, S) with all of 256 levels about equally frequent in each channel; equals torchvision's.

    That is Pillow's rule: the pixels up to a level, without those of the highest one, are counted in steps of a 255th.
    """
    levels = _levels(images).flatten(2).long()
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, levels, counts.new_ones(1).expand_as(levels))
    highest = levels.amax(2, keepdim=True)
    step = (levels.shape[2] - counts.gather(2, highest)).div_(255, rounding_mode="floor")
    below = counts.cumsum(2, dtype=torch.int32).sub_(counts)
    table = below.add_(step // 2).div_(step.clamp_min(1), rounding_mode="floor").clamp_(0, 255).float().div_(255)
    equalized = table.gather(2, levels).view(images.shape)
    return torch.where(step[..., None] == 0, images, equalized)  # too few pixels for steps


def _levels(images: Tensor) -> Tensor:
    """float32, whole numbers from 0 to 255, as torchvision's conversion to uint8 rounds.

    Colours may be beyond [0, 1] by a rounding error: sampled bilinearly, white is 1 + 1e-7, which `solarize` makes -1e-7.
    """
    return (images * 255.999).floor_().clamp_(0, 255)


def per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _grey(images: Tensor) -> Tensor:
    """(B, 3, ...) -> (B, ...)"""
    red, green, blue = images.unbind(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
