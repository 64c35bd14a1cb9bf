"""Image files of every kind become the pixels people see: made here from arrays whose answer is known."""
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import ExifTags, Image

from llb.core.errors import InputError
from llb.data.images import (UnreadableImage, as_rgb, decode, image_extensions, image_kinds, parse_colour,
                             scan_folder)
from llb.data.preprocessing import Geometry, Preprocessing
from llb.data.unreadable import count_kinds
from llb.runs.config import Config

GOLDEN = Path(__file__).parent / "golden"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
CORNERS = np.array([[RED, GREEN, BLUE], [(0, 0, 0), (128,) * 3, (255,) * 3]], np.uint8)   # [2,3,3]


def read(path, background=(255, 255, 255)): return np.asarray(as_rgb(decode(path), background))


def saved(folder, image, name="a.png", **options):
    image.save(folder / name, **options)
    return folder / name


def png(path, bits, kind, rows, *chunks):
    "A PNG of any depth, as Pillow cannot write it; rows: bytes of each."
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    width = len(rows[0]) * 8 // bits // samples
    header = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    data = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks),
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(data))
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied(orientation, ending, tmp_path):
    seen = np.kron(CORNERS, np.ones((16, 16, 1), np.uint8))
    inverse = {1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1], 5: seen.transpose(1, 0, 2),
               6: np.rot90(seen), 7: seen[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(seen, -1)}[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(ending, {})
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(inverse)), f"a.{ending}", exif=exif, **options)
    assert np.abs(read(path).astype(int) - seen).max() <= (3 if ending == "jpg" else 0)
    assert ("rotated or mirrored by EXIF" in image_kinds(path)) == (orientation != 1)
    with Image.open(path) as opened: assert np.array_equal(np.asarray(as_rgb(opened)), read(path))


def test_damaged_exif_says_nothing(tmp_path):
    path = saved(tmp_path, Image.fromarray(CORNERS), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert np.array_equal(read(path), CORNERS)


LEVELS = np.array([[0, 256, 257, 32768, 65535]], np.uint16)
SCALED = [0, 1, 1, 128, 255]


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(ending, tmp_path):
    path = saved(tmp_path, Image.fromarray(LEVELS), f"a.{ending}")
    assert read(path)[0, :, 2].tolist() == SCALED and image_kinds(path) == ("16-bit or floating-point grey",)


def test_big_endian_and_32_bit_tiff(tmp_path):
    big = Image.frombytes("I;16B", (5, 1), LEVELS.astype(">u2").tobytes())
    for i, image in enumerate((big, Image.fromarray(LEVELS.astype(np.int32)))):
        assert read(saved(tmp_path, image, f"{i}.tif"))[0, :, 0].tolist() == SCALED


def test_floating_point_tiff_in_0_to_1_is_scaled_and_others_are_refused(tmp_path):
    assert read(saved(tmp_path, Image.fromarray(np.float32([[0, .5, 1]])), "a.tif"))[0, :, 1].tolist() == [0, 128, 255]
    for values in [[0, 255.]], [[-1, 0]], [[np.nan, 0]]:
        path = saved(tmp_path, Image.fromarray(np.float32(values)), "b.tif")
        with pytest.raises(UnreadableImage, match="b.tif .*only 0..1 has a known meaning"): decode(path)
    path = saved(tmp_path, Image.fromarray(np.int32([[-5, 70000]])), "c.tif")
    with pytest.raises(UnreadableImage, match="only 0..65535 has a known meaning"): decode(path)


def test_16_bit_png_of_every_kind(tmp_path):
    def row(*values): return struct.pack(f">{len(values)}H", *values)
    half = 128 * 257
    grey = png(tmp_path / "l.png", 16, 0, [row(0, half, 65535)], (b"tRNS", row(half)))
    assert read(grey, BLUE)[0].tolist() == [[0, 0, 0], list(BLUE), [255] * 3]
    assert read(png(tmp_path / "rgb.png", 16, 2, [row(65535, 0, half)]))[0, 0].tolist() == [255, 0, 128]
    grey_alpha = png(tmp_path / "la.png", 16, 4, [row(65535, 0, half, 65535)])
    assert read(grey_alpha, BLUE)[0].tolist() == [list(BLUE), [128] * 3]
    assert read(png(tmp_path / "rgba.png", 16, 6, [row(65535, 0, 0, 0)]), BLUE)[0, 0].tolist() == list(BLUE)


@pytest.mark.parametrize("background", ["white", "black", "#00ff00"])
@pytest.mark.parametrize("mode,ending", [
    ("RGBA", "png"), ("RGBA", "webp"), ("RGBA", "tif"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("RGB", "png"),
    ("L", "png"), ("PA", None), ("La", None), ("RGBa", None)])
def test_hidden_pixels_stay_hidden(mode, ending, background, tmp_path):
    preprocessing = Preprocessing((2, 2), (0.,) * 3, (1.,) * 3, background=parse_colour(background))
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    image = Image.new("RGBA", (2, 2), (90, 90, 90, 0))
    if mode == "PA": image = Image.new("PA", (2, 2))
    elif mode in ("P", "RGB", "L"):   # one index, colour or level is declared transparent
        image, options["transparency"] = Image.new(mode, (2, 2), 0), (0, 0, 0) if mode == "RGB" else 0
    else: image = image.convert("LA" if mode == "La" else "RGBA").convert(mode)
    decoded = decode(saved(tmp_path, image, f"a.{ending}", **options)) if ending else image
    seen = Geometry(preprocessing)(decoded)
    assert (seen.reshape(3, 4).T == preprocessing.background).all()


def test_half_transparent_pixels_are_blended(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.uint8([[[200, 0, 0, 51], [200, 0, 0, 255]]]), "RGBA"))
    assert read(path).tolist() == [[[244, 204, 204], [200, 0, 0]]]
    assert read(path, (0, 0, 0))[0, 0].tolist() == [40, 0, 0]


def test_1_bit_grey_palette_and_ycbcr(tmp_path):
    assert read(saved(tmp_path, Image.fromarray(np.array([[True, False]]))))[0].tolist() == [[255] * 3, [0] * 3]
    assert read(saved(tmp_path, Image.fromarray(np.uint8([[7, 200]]))))[0].tolist() == [[7] * 3, [200] * 3]
    palette = Image.fromarray(CORNERS).convert("P", palette=Image.Palette.ADAPTIVE, colors=6)
    for ending in "png", "gif", "bmp": assert np.array_equal(read(saved(tmp_path, palette, f"a.{ending}")), CORNERS)
    flat = Image.new("RGB", (8, 8), (200, 100, 50)).convert("YCbCr")
    for ending in "jpg", "tif":
        assert np.abs(read(saved(tmp_path, flat, f"b.{ending}")) - np.array([200, 100, 50])).max() < 4


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_cmyk_ink_is_dark_and_adobes_inverted_jpeg_is_not_inverted(ending, tmp_path):
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    path = saved(tmp_path, red, f"a.{ending}")   # Pillow writes JPEG as Adobe does
    assert np.abs(read(path).astype(int) - RED).max() < 4 and image_kinds(path) == ("CMYK",)


def test_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (4, 4), c) for c in (RED, GREEN)]
    for ending in "gif", "tif", "webp", "png":
        options = {"lossless": True} if ending == "webp" else {}
        path = saved(tmp_path, frames[0], f"a.{ending}", save_all=True, append_images=frames[1:], **options)
        assert (read(path) == RED).all() and image_kinds(path) == ("of several frames or pages (the first is used)",)
    others = saved(tmp_path, frames[0], "b.png"), tmp_path / "none.png"
    counts = count_kinds([tmp_path / "a.gif", tmp_path / "a.tif", *others])
    assert dict(counts) == {"of several frames or pages (the first is used)": 2}


@pytest.mark.skipif(".avif" not in image_extensions(), reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path):
    assert np.abs(read(saved(tmp_path, Image.new("RGB", (16, 16), RED), "a.avif")).astype(int) - RED).max() < 8


def test_the_committed_files_have_the_pixels_their_names_say():
    "orientation6: upright red over blue; grey16: 0, 128, 255; glass: hidden green; cmyk: red."
    top, bottom = read(GOLDEN / "orientation6.jpg")[8, 8], read(GOLDEN / "orientation6.jpg")[-8, 8]
    assert np.abs(top.astype(int) - RED).max() < 6 and np.abs(bottom.astype(int) - BLUE).max() < 6
    assert read(GOLDEN / "grey16.png")[0, :, 0].tolist() == [0, 128, 255]
    assert (read(GOLDEN / "glass.png") == 255).all() and (read(GOLDEN / "glass.png", RED) == RED).all()
    assert np.abs(read(GOLDEN / "cmyk.jpg").astype(int) - RED).max() < 4


# Hazards

def test_postscript_in_a_jpg_starts_no_program(tmp_path, monkeypatch):
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(UnreadableImage, match="a.jpg cannot be decoded"): decode(tmp_path / "a.jpg")
    assert not (tmp_path / "called").exists()


def test_a_very_thin_image_is_resized_in_no_more_memory_than_its_middle_needs(tmp_path):
    path = saved(tmp_path, Image.new("L", (1_500_000, 1), 77))
    preprocessing = Preprocessing((224, 224), (0.,) * 3, (1.,) * 3)
    assert (Geometry(preprocessing)(decode(path)) == 77).all()
    assert preprocessing.transform(train=True)(decode(path)).shape == (3, 224, 224)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for function in decode, image_kinds:
        with pytest.raises(UnreadableImage, match="a.png"): function(tmp_path / "a.png")


def test_caches_of_another_decoding_are_not_used(tmp_path, monkeypatch):
    images = scan_folder(make_images(tmp_path, 2))
    before = images.content_key
    monkeypatch.setattr("llb.data.images.DECODING", 1)
    assert scan_folder(tmp_path).content_key != before


@pytest.mark.parametrize("value", ["whitish", "1,2", "300,0,0", "#12345678"])
def test_a_background_that_is_no_colour_is_refused(value):
    with pytest.raises(InputError, match="alpha_background is .* must be a colour"): Config.of(alpha_background=value)


def test_a_saved_model_keeps_its_background(tmp_path):
    from llb.models.backbone import load_backbone
    from llb.models.llb import LLB
    backbone = load_backbone("test_vit", pretrained=False, image_size=32, alpha_background="0,0,0")
    LLB(backbone, 8, 2, 3, num_classes=3).save_pretrained(tmp_path)
    model = LLB.from_pretrained(tmp_path)
    assert model.backbone.preprocessing.background == (0, 0, 0)
    glass, black = Image.new("RGBA", (32, 32), (0, 255, 0, 0)), Image.new("RGB", (32, 32))
    assert torch.equal(*(model.backbone.transform()(image) for image in (glass, black)))
    assert np.allclose(*(model.predict(image).probabilities["label"] for image in (glass, black)))
