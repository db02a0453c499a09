"""images.py: every mode and format, hostile files, and Prismatic's resize arithmetic."""
import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

import images
from images import letterbox, open_image, resize_crop, resize_naive


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photo(w, h, seed=0):                                # smooth, so that resizing it means something
    small = Image.fromarray(pixels(min(h, 5), min(w, 5), 3, seed=seed))
    return small.resize((w, h), Image.Resampling.BILINEAR)


def encoded(image, format='PNG', **kw):
    buffer = io.BytesIO()
    image.save(buffer, format, **kw)
    return buffer.getvalue()


# --- opening images ----------------------------------------------------------------------------------------------

RAMP = np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4)                       # 0 17 ... 255


def greys(image):
    a = np.asarray(image)
    assert image.mode == 'RGB' and a.shape == (4, 4, 3) and (a == a[..., :1]).all()
    return a[..., 0]


@pytest.mark.parametrize('mode, format, image', [
    ('1', 'PNG', Image.fromarray(RAMP).convert('L').point(lambda v: 255 * (v > 127)).convert('1')),
    ('L', 'PNG', Image.fromarray(RAMP)),
    ('L', 'JPEG2000', Image.fromarray(RAMP)),
    ('L', 'PPM', Image.fromarray(RAMP)),
    ('LA', 'PNG', Image.fromarray(RAMP).convert('LA')),
    ('P', 'PNG', Image.fromarray(RAMP).convert('P')),
    ('P', 'GIF', Image.fromarray(RAMP).convert('P')),
    ('RGB', 'WEBP', Image.fromarray(RAMP).convert('RGB')),
    ('RGB', 'BMP', Image.fromarray(RAMP).convert('RGB')),
    ('RGBA', 'PNG', Image.fromarray(RAMP).convert('RGBA')),
    ('CMYK', 'TIFF', Image.fromarray(RAMP).convert('RGB').convert('CMYK')),
    ('I;16', 'PNG', Image.fromarray(RAMP.astype(np.uint16) * 257)),
    ('I;16', 'TIFF', Image.fromarray(RAMP.astype(np.uint16) * 257)),
    ('I', 'PPM', Image.fromarray(RAMP.astype(np.int32) * 257)),
    ('I', 'TIFF', Image.fromarray(RAMP.astype(np.int32) * 257)),
    ('I', 'TIFF', Image.fromarray(RAMP.astype(np.int32) * 1000 - 70_000)),       # no nominal white: stretched
    ('F', 'TIFF', Image.fromarray(RAMP.astype(np.float32) / 255)),
    ('F', 'TIFF', Image.fromarray(RAMP.astype(np.float32))),
    ('F', 'TIFF', Image.fromarray(RAMP.astype(np.float32) * 9 - 300))])
def test_every_grey_mode_keeps_its_shades(mode, format, image):
    assert image.mode == mode
    kw = {'lossless': True} if format == 'WEBP' else {}
    expected = 255 * (RAMP > 127) if mode == '1' else RAMP
    assert np.array_equal(greys(open_image(encoded(image, format, **kw))), expected)
    assert np.array_equal(greys(images.to_rgb(image)), expected)                 # resize functions take any mode too


def test_colour_modes_keep_their_colours():
    rgb = photo(16, 16)
    for format, image, tol in [('JPEG', rgb, 12), ('JPEG', rgb.convert('CMYK'), 12), ('TIFF', rgb.convert('YCbCr'), 3),
                               ('PNG', rgb.quantize(256), 6), ('GIF', rgb.quantize(256), 6)]:
        kw = {'quality': 98, 'subsampling': 0} if format == 'JPEG' else {}
        got = np.asarray(open_image(encoded(image, format, **kw))).astype(int)
        assert np.abs(got - np.asarray(rgb)).max() <= tol, (format, image.mode)


def test_transparency_becomes_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0], rgba[0, 1], rgba[1, 0] = (200, 0, 0, 255), (200, 0, 0, 0), (0, 0, 0, 128)
    seen = np.asarray(open_image(encoded(Image.fromarray(rgba))))
    assert seen[0, 0].tolist() == [200, 0, 0] and seen[0, 1].tolist() == [255] * 3 and seen[1, 0].tolist() == [127] * 3
    la = Image.fromarray(np.array([[[0, 0], [90, 255]]], np.uint8), 'LA')
    assert np.asarray(open_image(encoded(la)))[0].tolist() == [[255] * 3, [90] * 3]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), 'P')
    palette.putpalette([10, 20, 30, 40, 50, 60])
    for format, transparency, first in [('PNG', 0, [255] * 3), ('GIF', 0, [255] * 3),
                                        ('PNG', bytes([255, 255]), [10, 20, 30])]:
        seen = np.asarray(open_image(encoded(palette, format, transparency=transparency)))
        assert seen[0].tolist() == [first, [40, 50, 60]], (format, transparency)
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert np.asarray(open_image(encoded(keyed, transparency=(1, 2, 3))))[0].tolist() == [[255] * 3, [4, 5, 6]]


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_exif_orientation_is_undone(format):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255                              # white at the top left
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
              6: np.rot90(upright, 1), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1)}
    for orientation, a in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        kw = {'lossless': True} if format == 'WEBP' else {}
        seen = np.asarray(open_image(encoded(Image.fromarray(np.ascontiguousarray(a)), format, exif=exif, **kw)))
        assert seen.shape == (16, 32, 3) and np.abs(seen.astype(int) - upright).max() < 30, orientation


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_damaged_exif_leaves_the_image_as_stored():
    data = encoded(photo(16, 8), 'JPEG', exif=b'Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\xff\x01\x12')
    assert open_image(data).size == (16, 8)


def test_the_stored_frame_is_there_for_boxes_that_are_counted_in_it():
    exif = Image.Exif()
    exif[0x0112] = 6                                    # stored lying on its side
    data = encoded(photo(16, 8), 'JPEG', exif=exif)
    assert open_image(data).size == (8, 16) and open_image(data, upright=False).size == (16, 8)
    plain = np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
    assert (np.asarray(open_image(data, upright=False)) == plain).all()
    assert (np.asarray(open_image(data)) == np.rot90(plain, -1)).all()


def test_first_frame_of_an_animation():
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'lime', 'blue')]
    for format in ('GIF', 'WEBP', 'PNG', 'TIFF', 'MPO'):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.abs(np.asarray(open_image(data)).astype(int) - [255, 0, 0]).max() <= 3, format


def test_path_and_bytes_give_the_same_image(tmp_path):
    path = tmp_path / 'a.png'
    path.write_bytes(encoded(photo(9, 7)))
    assert np.array_equal(open_image(str(path)), open_image(path.read_bytes()))
    assert np.array_equal(open_image(path), photo(9, 7))


def test_unreadable_images_are_named_with_the_reason(tmp_path):
    path = tmp_path / 'cut.jpg'
    path.write_bytes(encoded(photo(64, 64), 'JPEG')[:-300])
    with pytest.raises(ValueError, match='cut.jpg: .*truncated'):
        open_image(str(path))
    with pytest.raises(ValueError, match='absent.png: .*No such file'):
        open_image(str(tmp_path / 'absent.png'))
    for bad in (b'', b'hello', b'\x89PNG\r\n\x1a\n' + b'\0' * 40, encoded(photo(9, 9))[:40]):
        with pytest.raises(ValueError, match=f'^image of {len(bad)} bytes: '):
            open_image(bad)
    with pytest.raises(ValueError, match='not an image'):                        # Pillow would hand this to ghostscript
        open_image(encoded(photo(9, 9), 'EPS'))
    os.mkfifo(tmp_path / 'pipe.png')
    with pytest.raises(ValueError, match='pipe.png: not a file'):
        open_image(str(tmp_path / 'pipe.png'))
    nan = Image.fromarray(np.full((2, 2), np.nan, np.float32))
    with pytest.raises(ValueError, match='not finite'):
        open_image(encoded(nan, 'TIFF'))


@pytest.mark.filterwarnings('ignore')                   # Pillow's own remarks about bombs and damaged EXIF blocks
def test_corrupt_bytes_give_an_image_or_a_value_error():
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    refused = 0
    for format, kw in [('JPEG', {'exif': exif}), ('PNG', {'exif': exif}), ('WEBP', {'exif': exif}), ('GIF', {}),
                       ('BMP', {}), ('TIFF', {}), ('PPM', {}), ('JPEG2000', {})]:
        data = np.frombuffer(encoded(photo(40, 30), format, **kw), np.uint8)
        for n in range(60):
            bad = data[:rng.integers(len(data))] if n % 3 == 0 else data.copy()
            if n % 3:
                where = rng.integers(len(data) if n % 3 == 1 else min(len(data), 300), size=rng.integers(1, 12))
                bad[where] = rng.integers(0, 256, len(where))
            try:
                image = open_image(bad.tobytes())
            except ValueError as error:
                refused += '\n' not in str(error)
            else:
                assert image.mode == 'RGB' and image.width * image.height <= images.MAX_PIXELS
    assert refused > 100


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_bombs_are_refused_from_the_header(monkeypatch):
    def bmp(w, h):                                      # 54 bytes that promise w x h pixels
        return b'BM' + (54).to_bytes(4, 'little') + b'\0' * 4 + b''.join(
            v.to_bytes(4, 'little') for v in (54, 40, w, h, 1 | 24 << 16)) + b'\0' * 24
    with pytest.raises(ValueError, match='10000 x 10000 pixels, expected 1 to 89,478,485'):
        open_image(bmp(10_000, 10_000))
    with pytest.raises(ValueError, match='exceeds limit|expected 1 to'):
        open_image(bmp(60_000, 60_000))
    with pytest.raises(ValueError, match='truncated|expected'):                  # below the limit the decoder sees it
        open_image(bmp(100, 100))
    with pytest.raises(ValueError, match='^image of'):
        open_image(bmp(0, 10))
    thin = Image.new('L', (30_000, 1))
    with pytest.raises(ValueError, match='30000 x 1 pixels needs 30000 x 29999'):
        letterbox(thin, 32)
    assert resize_naive(thin, 32).shape == resize_crop(thin, 32).shape == (3, 32, 32)
    monkeypatch.setattr(images, 'MAX_PIXELS', 900_000)
    with pytest.raises(ValueError, match='needs 960000 x 32'):
        resize_crop(thin, 32)


def test_a_zero_side_is_refused():
    for resize in images.RESIZE.values():
        for size in [(0, 5), (5, 0), (0, 0)]:
            with pytest.raises(ValueError, match='a side is zero'):
                resize(Image.new('RGB', size), 8)


# --- Prismatic's arithmetic --------------------------------------------------------------------------------------

def crop_of_resized(array, resized, left, top, size):
    big = Image.fromarray(array).resize(resized, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(big)[top:top + size, left:left + size].copy()).permute(2, 0, 1)


@pytest.mark.parametrize('wh, pads, resized, left_top', [                        # worked out by hand at size 384
    ((640, 481), (0, 79), (384, 384), (0, 0)),          # 640 x 639: one pixel short of a square, hidden by the resize
    ((481, 640), (79, 0), (384, 384), (0, 0)),
    ((640, 480), (0, 80), (384, 384), (0, 0)),
    ((100, 3), (0, 48), (387, 384), (2, 0)),            # 100 x 99: int(384 * 100 / 99) = 387, crop at round(1.5) = 2
    ((3, 100), (48, 0), (384, 387), (0, 2)),
    ((2, 1), (0, 0), (768, 384), (192, 0)),             # a difference of one is not padded at all
    ((384, 384), (0, 0), (384, 384), (0, 0)),
    ((1, 1), (0, 0), (384, 384), (0, 0))])
def test_letterbox_is_prismatics(wh, pads, resized, left_top):
    array = np.asarray(photo(*wh))
    fill = (127, 116, 104)
    padded = np.empty((wh[1] + 2 * pads[1], wh[0] + 2 * pads[0], 3), np.uint8)
    padded[:] = fill
    padded[pads[1]:pads[1] + wh[1], pads[0]:pads[0] + wh[0]] = array
    out = letterbox(Image.fromarray(array), 384, fill)
    assert out.dtype == torch.uint8 and out.is_contiguous()
    assert torch.equal(out, crop_of_resized(padded, resized, *left_top, 384))


@pytest.mark.parametrize('wh, resized, left_top', [
    ((640, 481), (510, 384), (63, 0)), ((481, 640), (384, 510), (0, 63)),
    ((100, 3), (12800, 384), (6208, 0)),
    ((641, 480), (512, 384), (64, 0)),                  # int(512.8)
    ((389, 384), (389, 384), (2, 0)),                   # round(2.5) = 2: half to even
    ((387, 384), (387, 384), (2, 0)),                   # round(1.5) = 2
    ((1, 1), (384, 384), (0, 0))])
def test_resize_crop_is_prismatics(wh, resized, left_top):
    array = np.asarray(photo(*wh))
    assert torch.equal(resize_crop(Image.fromarray(array), 384), crop_of_resized(array, resized, *left_top, 384))


@pytest.mark.parametrize('wh', [(640, 480), (480, 640), (1000, 400), (90, 30), (31, 77), (5, 5)])
@pytest.mark.parametrize('size', [(224, 448), (448, 672), (60, 30)])
def test_an_image_of_two_sides_is_letterboxed_whole_and_in_its_own_aspect(wh, size):
    (w, h), (H, W) = wh, size
    out = letterbox(Image.new('RGB', wh, (255, 0, 0)), size, (0, 0, 255)).float()
    assert out.shape == (3, H, W)
    share = (out[0] > 127).float()                                       # red: the image, in the middle of what is blue
    scale = min(W / w, H / h)
    across, down = share[H // 2].sum(), share[:, W // 2].sum()
    assert abs(across - w * scale) <= 2 + W / w and abs(down - h * scale) <= 2 + H / h      # a pixel of either
    assert abs(share[H // 2].nonzero().float().mean() - (W - 1) / 2) <= 1 + W / w
    assert resize_naive(Image.new('RGB', wh), size).shape == resize_crop(Image.new('RGB', wh), size).shape == (3, H, W)


def test_a_jpeg_for_two_sides_keeps_twice_the_longer_one():
    file = io.BytesIO()
    photo(1792, 1792).save(file, 'JPEG')
    opened = [open_image(file.getvalue(), size=size).size for size in (224, [224, 448], [112, 224], 0)]
    assert opened == [(448, 448), (896, 896), (448, 448), (1792, 1792)]


def test_resize_naive_squashes():
    for wh in [(640, 481), (3, 100), (1, 1)]:
        array = np.asarray(photo(*wh))
        assert torch.equal(resize_naive(Image.fromarray(array), 32), crop_of_resized(array, (32, 32), 0, 0, 32))


# --- aspect ratios that are kept, photos that are split --------------------------------------------------------------

def test_grids_are_idefics2s():
    slow = pytest.importorskip('transformers.models.idefics2.image_processing_pil_idefics2')
    from transformers.image_utils import SizeDict
    rng = np.random.default_rng(3)
    sizes = [*rng.integers(1, 3000, (400, 2)).tolist(), (980, 980), (981, 980), (980, 981), (600, 400), (1201, 801)]
    seen = set()
    for longest, shortest, patch in ((980, 378, 14), (384, 148, 14), (42, 16, 14), (224, 86, 16), (14, 5, 14)):
        for w, h in sizes:
            if max(w, h) > images.MAX_ASPECT * min(w, h):
                continue
            rows, columns = images.grid_of(w, h, longest, shortest, patch)
            theirs = slow.get_resize_output_image_size(np.empty((3, h, w), np.bool_), SizeDict(
                longest_edge=longest, shortest_edge=max(shortest, patch)))
            assert (rows, columns) == tuple(edge // patch for edge in theirs), (w, h, longest)
            assert 1 <= rows <= longest // patch and 1 <= columns <= longest // patch
            seen.add((longest, rows, columns))
    assert len(seen) > 100
    for w, h in ((21, 1), (1, 21), (2001, 100)):
        with pytest.raises(ValueError, match=f"image of {w} x {h} pixels: aspect='keep' takes up to 20 to 1"):
            images.grid_of(w, h, 980, 378, 14)


def keep(split=False, size=42, patch=14, per_patch=1):
    n = per_patch * (size // patch) ** 2 * (5 if split else 1)
    return images.View(size, n, shortest=size * 27 // 70, patch=patch, per_patch=per_patch, split=split)


def test_a_share_of_a_photo_is_the_same_share_of_what_is_seen():
    view = keep(size=210)
    for w, h in ((300, 200), (200, 301), (64, 1000), (57, 43), (999, 401)):
        x, y = np.linspace(0, 255, w), np.linspace(0, 255, h)            # red says where across, green where down
        ramp = np.stack((np.tile(x, (h, 1)), np.tile(y[:, None], (1, w)), np.zeros((h, w))), 2)
        ((seen,), n) = view(Image.fromarray(ramp.astype(np.uint8)))
        assert n == seen.shape[1] * seen.shape[2] // 14 ** 2 and seen.shape[1] % 14 == seen.shape[2] % 14 == 0
        across, down = seen[0].float().mean(0) / 255, seen[1].float().mean(1) / 255
        for values in (across, down):                                    # one pixel of the smaller side, and rounding
            expected = (torch.arange(len(values)) + 0.5) / len(values)
            assert (values - expected).abs().max() < 1 / min(len(values), w, h) + 0.01, (w, h)


def test_a_split_photo_is_its_quarters_and_then_the_whole():
    for w, h in ((60, 40), (61, 41), (2, 2), (3, 50)):
        image = photo(w, h, seed=w)
        x, y = w // 2, h // 2
        parts = [image.crop(box) for box in ((0, 0, x, y), (x, 0, w, y), (0, y, x, h), (x, y, w, h))] + [image]
        for resize in images.RESIZE:
            pixels_, n = images.View(28, 20, resize, split=True)(image)
            assert n == 20 and torch.equal(pixels_, torch.stack([images.RESIZE[resize](part, 28) for part in parts]))
        if max(w, h) <= 20:
            pixels_, n = keep(split=True, per_patch=2)(image)
            alone = [keep(per_patch=2)(part) for part in parts]
            assert n == sum(k for _, k in alone)
            assert all(torch.equal(a, b) for a, ((b,), _) in zip(pixels_, alone, strict=True))
    for view in (keep(split=True), images.View(28, 20, split=True)):
        with pytest.raises(ValueError, match='a side is zero'):
            view(photo(1, 9))


def test_a_jpeg_that_is_decoded_smaller_has_the_same_grid():
    out = io.BytesIO()
    photo(1600, 1200).save(out, 'JPEG', quality=95)
    for view in (keep(size=70), keep(split=True, size=70)):
        assert view.decode == 70 * (1 + view.split)
        (small, n), (whole, m) = (view(open_image(out.getvalue(), size=size)) for size in (view.decode, 0))
        assert n == m and [part.shape for part in small] == [part.shape for part in whole]
        assert all((a.float() - b.float()).abs().mean() < 2 for a, b in zip(small, whole))
        assert open_image(out.getvalue(), size=view.decode).size == ((400, 300) if view.split else (200, 150))


def test_images_of_their_own_sizes_are_one_memory():
    view = keep(split=True)
    views = [view(photo(w, h))[0] for w, h in ((60, 40), (40, 60), (50, 50))]
    together = images.batched(views)
    assert all(torch.equal(a, b) for x, y in zip(views, together, strict=True) for a, b in zip(x, y, strict=True))
    assert len({part.untyped_storage().data_ptr() for image in together for part in image}) == 1
    assert images.each(lambda t: t.sum().item(), together)[2][4] == int(views[2][4].sum())
