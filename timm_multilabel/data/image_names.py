"""The formats of image files that are read, and how their names end."""
from PIL import Image

# Pillow's formats of photos. Of its others some start a program (EPS) or read files that the image names.
FORMATS = ('JPEG', 'MPO', 'PNG', 'WEBP', 'GIF', 'BMP', 'DIB', 'TIFF', 'JPEG2000', 'AVIF', 'PPM', 'TGA', 'PCX', 'ICO')
ENDINGS = frozenset(
    ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS) - {'.pfm'}
"""How the names of files of these formats end, in lower case; without that of floats, whose range is unknown."""
