"""
Images from files: opened whatever their format or damage, and resized as Prismatic does (arXiv 2402.07865) or, with
their aspect ratio, as Idefics2 does (arXiv 2405.02246).
"""
import contextlib
import io
import math
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from errors import UserError, first_line

# --- sizes -------------------------------------------------------------------------------------------------------

def sides(size):
    """(height, width) in pixels of an image size: a number of a square, or the two themselves."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def token_grid(n_token):
    """
    The grid (h, w) of so many tokens of an image: the most square one with h <= w, such as 16 x 16, 16 x 32, 27 x 27
    and 32 x 48 of 256, 512, 729 and 1536. Raises UserError where w is above 2 h.
    """
    h = next(h for h in range(math.isqrt(n_token), 0, -1) if n_token % h == 0)
    if n_token > 2 * h * h:
        raise UserError(f"image_tokens={n_token}: a grid of {h} x {n_token // h} at best, expected h <= w <= 2 h; take "
                        "a number such as 256, 512, 729 or 1024")
    return h, n_token // h


# --- opening -----------------------------------------------------------------------------------------------------

MAX_PIXELS = 89_478_485       # per decoded image or padded canvas: 268 MB as RGB, and where Pillow starts to warn
# an explicit list: Pillow also "opens" EPS by running ghostscript, which untrusted data must never reach
warnings.filterwarnings('ignore', module='PIL')        # what it says of a damaged file is one line here
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM', 'JPEG2000')


def open_image(source, upright=True, size=0):
    """
    Decode one image (the first frame of an animation) as RGB; transparency becomes white.
    source   path, or the file's bytes
    upright  turn it as its EXIF orientation says; False = the pixels as stored, in which COCO counts its boxes
    size     it will be resized to that (see sides): a JPEG is decoded at 1/2, 1/4 or 1/8 where each side keeps twice as
             many and is a multiple of twice 2, 4 or 8, so that nothing shifts. Photos at 384 change by 0.4 of 255 on
             average, 10 at most, and are read twice as fast; 0 = decode the whole
    returns  PIL image, mode RGB
    Raises UserError naming the file and the reason: missing, not an image, truncated, corrupt, above MAX_PIXELS.
    """
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    if not isinstance(source, bytes) and os.path.exists(source) and not os.path.isfile(source):
        raise UserError(f"{name}: not a file")                                   # a pipe would wait for ever
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS or min(image.size) < 1:   # known from the header alone
                raise UserError(f"{image.width} x {image.height} pixels, expected 1 to {MAX_PIXELS:,} in all")
            most = max(sides(size))
            by = [n for n in (2, 4, 8) if most and all(v >= 2 * n * most and v % (2 * n) == 0 for v in image.size)]
            if by:
                image.draft(None, (image.width // by[-1], image.height // by[-1]))
            image.load()
            if upright:
                with contextlib.suppress(Exception):           # a damaged EXIF block does not spoil the pixels
                    ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image, or its header is damaged; readable: {', '.join(FORMATS)}") from error
    except Exception as error:                               # damaged files make Pillow raise a dozen kinds of them
        raise UserError(f"{name}: {first_line(error)}") from error


def to_rgb(image):
    """
    Any PIL mode to RGB: whatever is transparent over white (Prismatic drops the alpha and shows the colour that hides
    there, often black); 16-bit grey is scaled, not clipped.
    Raises UserError for a zero side, for values that are not finite, and for modes Pillow cannot convert (LAB).
    """
    if min(image.size) < 1:
        raise UserError(f"image of {image.width} x {image.height} pixels: a side is zero")
    if image.mode == 'F' or image.mode.startswith('I'):
        return _deep_grey_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert('RGBA')
        canvas = Image.new('RGB', image.size, (255, 255, 255))
        canvas.paste(image, mask=image)
        return canvas
    return image.convert('RGB')


def _deep_grey_to_rgb(image):
    v = np.asarray(image).astype(np.float32)                                     # (h, w)
    low, high = float(v.min()), float(v.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError("pixel values are not finite")
    # 32-bit modes have no nominal white: take the smallest usual range that holds the values, else stretch
    tops = (1, 255) if image.mode == 'F' else (65535,)
    top = next((t for t in tops if 0 <= low and high <= t), None)
    black, white = (0.0, float(top)) if top else (low, max(high, low + 1))
    grey = np.rint((v - black) * (255 / (white - black))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert('RGB')


# --- resizing ----------------------------------------------------------------------------------------------------

def letterbox(image, size, fill=(127, 127, 127)):
    """
    Pad towards a square with `fill`, resize the shorter edge to `size` (bicubic), crop the centre.
    image    PIL image, any mode and aspect
    size     pixels a side, or (height, width): then padded towards that aspect, and resized until it covers both
    fill     grey is int(255 * 0.5), SigLIP's mean; Prismatic takes the mean of each encoder
    returns  (3, height, width) uint8
    Raises UserError for a zero side or a canvas above MAX_PIXELS. Prismatic's "letterbox" (arXiv 2402.07865): an odd
    difference leaves the square one pixel short (640x481 becomes 640x639), which the resize and the crop then hide.
    """
    image = to_rgb(image)
    (w, h), (H, W) = image.size, sides(size)
    pad_x, pad_y = (max(w, h * W // H) - w) // 2, (max(h, w * H // W) - h) // 2  # the same on both sides
    canvas_size = (w + 2 * pad_x, h + 2 * pad_y)
    _check_pixels(image, canvas_size)
    canvas = Image.new('RGB', canvas_size, tuple(fill))
    canvas.paste(image, (pad_x, pad_y))
    return _shorter_edge_and_crop(canvas, size)


def resize_naive(image, size):
    """
    Resize to a square, aspect squashed (bicubic): Prismatic's "resize-naive".
    image PIL image, any mode and aspect -> (3, height, width) uint8, see sides. Raises UserError for a zero side.
    """
    return _to_tensor(to_rgb(image).resize(sides(size)[::-1], Image.Resampling.BICUBIC))


def resize_crop(image, size):
    """
    Resize the shorter edge to `size` (bicubic) and crop the centre, borders lost: Prismatic's "resize-crop".
    image PIL image, any mode and aspect -> (3, height, width) uint8, see sides. Raises UserError as letterbox does.
    """
    return _shorter_edge_and_crop(to_rgb(image), size)


RESIZE = {'letterbox': letterbox, 'naive': resize_naive, 'crop': resize_crop}


def _check_pixels(image, new_size):
    if new_size[0] * new_size[1] > MAX_PIXELS:                                   # 60000 x 1 px asks for a 10 GB canvas
        raise UserError(f"image of {image.width} x {image.height} pixels needs {new_size[0]} x {new_size[1]} to be "
                         f"resized, above MAX_PIXELS = {MAX_PIXELS:,}: crop or shrink it first")


def _shorter_edge_and_crop(image, size):
    # torchvision's Resize(size) and CenterCrop(size), to the pixel; its padding of small images cannot occur here
    (w, h), (H, W) = image.size, sides(size)
    new_w, new_h = (W, max(H, int(W * h / w))) if w * H <= h * W else (max(W, int(H * w / h)), H)
    _check_pixels(image, (new_w, new_h))
    image = image.resize((new_w, new_h), Image.Resampling.BICUBIC)
    left, top = round((new_w - W) / 2), round((new_h - H) / 2)                   # half to even, as torchvision's
    return _to_tensor(image.crop((left, top, left + W, top + H)))


def _to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()       # (3, h, w) uint8


# --- what a model sees of a photo --------------------------------------------------------------------------------

MAX_ASPECT = 20               # of a photo's edges, where it is kept: beyond, the rule below stretches it eightfold


def grid_of(width, height, longest, shortest, patch):
    """
    The grid (rows, columns) of whole patches of a photo that keeps its aspect ratio, all in pixels: Idefics2's rule
    (arXiv 2405.02246). The longer edge becomes at most `longest`, then each at least `shortest`, which only a small or
    a long photo feels. Raises UserError beyond MAX_ASPECT.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(f"image of {width} x {height} pixels: aspect='keep' takes up to {MAX_ASPECT} to 1; crop it, or "
                        "--max_bad_samples=N leaves it out")
    ratio = width / height
    if width >= height and width > longest:
        width, height = longest, int(longest / ratio)
    elif height > width and height > longest:
        width, height = int(longest * ratio), longest
    return tuple(max(edge, shortest, patch) // patch for edge in (height, width))


@dataclass(frozen=True)
class View:
    """
    How a photo becomes what a model reads: view(image) -> (pixels, positions it takes in a row).
    size       pixels of a square's side or (height, width), or of the longest edge where the aspect is kept
    n_slot     positions of a photo, of the largest where they differ; per_patch positions of a patch, 0 = none differs
    shortest   pixels: the least of an edge where the aspect is kept; 0 = squares, made by `resize`
    split      a photo is five images: its quarters (top left, top right, bottom left, bottom right), then the whole
    pixels     uint8 (3,S,S), or (5,3,S,S) split; where the aspect is kept a list of 1 or 5 images (3,h,w)
    """
    size: int
    n_slot: int
    resize: str = 'letterbox'
    shortest: int = 0
    patch: int = 1
    per_patch: int = 0
    split: bool = False

    @property
    def decode(self):
        """The size for open_image: a quarter of a photo is resized to it as the whole is."""
        return max(sides(self.size)) * (1 + self.split)

    def __call__(self, image):
        parts = [image]
        if self.split:
            (w, h), (x, y) = image.size, (edge // 2 for edge in image.size)
            parts = [image.crop(box) for box in ((0, 0, x, y), (x, 0, w, y), (0, y, x, h), (x, y, w, h))] + parts
        pixels = [self._kept(part) if self.shortest else RESIZE[self.resize](part, self.size) for part in parts]
        pixels = pixels if self.shortest else torch.stack(pixels) if self.split else pixels[0]
        return pixels, self.positions(pixels)

    def positions(self, pixels):
        """Positions in a row that a photo takes whose pixels this view made."""
        if isinstance(pixels, torch.Tensor) or not self.per_patch:
            return self.n_slot
        return self.per_patch * sum(part[0].numel() // self.patch ** 2 for part in pixels)

    def _kept(self, image):
        image = to_rgb(image)
        rows, columns = grid_of(*image.size, self.size, self.shortest, self.patch)
        return _to_tensor(image.resize((columns * self.patch, rows * self.patch), Image.Resampling.BICUBIC))


def each(f, images):
    """f of the tensors of images as `batched` gives them, or None."""
    if isinstance(images, list):
        return [[f(part) for part in image] for image in images]
    return None if images is None else f(images)


def batched(images):
    """Images as views give them, as one: (N,...) of squares; others as lists of parts in one memory, sent as one."""
    if isinstance(images[0], torch.Tensor):
        return torch.stack(images)
    parts = [part for image in images for part in image]
    memory = iter(torch.cat([part.flatten() for part in parts]).split([part.numel() for part in parts]))
    return [[next(memory).view(part.shape) for part in image] for image in images]
