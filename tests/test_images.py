"""Image files of every mode."""
import numpy as np
import pytest
from PIL import Image

from timm_multilabel.data.images import read_photo
from timm_multilabel.errors import UserError


def decode(path, where='row 2'):
    return Image.fromarray(read_photo(path, where).decode())


@pytest.mark.parametrize('mode, suffix', [
    ('RGB', 'jpg'), ('L', 'jpg'), ('CMYK', 'jpg'), ('P', 'png'), ('RGBA', 'png'), ('LA', 'png'), ('1', 'png')])
def test_every_mode_comes_out_as_rgb(tmp_path, mode, suffix):
    path = tmp_path / f'x.{suffix}'
    Image.new('RGB', (5, 3), 'white').convert(mode).save(path)
    image = decode(str(path))
    assert image.mode == 'RGB' and image.size == (5, 3)
    assert np.asarray(image).min() >= 253


def test_16_bit_greyscale_keeps_its_range(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(2, axis=0)
    Image.fromarray(ramp).save(tmp_path / 'x.png')
    image = np.asarray(decode(str(tmp_path / 'x.png')))
    assert image[0, :, 0].tolist() == list(range(256))


def test_float_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / 'x.tiff')
    with pytest.raises(UserError, match='pixels of mode F'):
        decode(str(tmp_path / 'x.tiff'))


def test_transparent_pixels_become_white(tmp_path):
    Image.new('RGBA', (2, 2), (255, 0, 0, 0)).save(tmp_path / 'x.png')
    assert decode(str(tmp_path / 'x.png')).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_undone(tmp_path):
    image = Image.new('RGB', (20, 10), 'black')
    image.paste('white', (0, 0, 20, 5))  # white on top
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    image.rotate(90, expand=True).save(tmp_path / 'x.png', exif=exif)
    upright = decode(str(tmp_path / 'x.png'))
    assert upright.size == (20, 10)
    assert upright.getpixel((10, 1)) == (255, 255, 255) and upright.getpixel((10, 8)) == (0, 0, 0)


@pytest.mark.parametrize('content', [b'', b'not an image', b'\xff\xd8\xff\xe0 half a jpeg'])
def test_what_cannot_be_decoded_is_named_with_its_row(tmp_path, content):
    (tmp_path / 'x.jpg').write_bytes(content)
    with pytest.raises(UserError, match=r'x\.jpg \(train\.csv row 7\): cannot be decoded') as error:
        decode(str(tmp_path / 'x.jpg'), 'train.csv row 7')
    assert '\n' not in str(error.value)
