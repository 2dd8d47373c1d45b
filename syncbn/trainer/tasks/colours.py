"""A colour for each class in pictures, the same in all of them."""

from colorsys import hsv_to_rgb

Colour = tuple[int, int, int]
"""Red, green, blue; 0 to 255."""

# Of the first classes: in CIELAB no two nearer than 22, nor near to GREY
FIRST: tuple[Colour, ...] = (
    (38, 38, 46), (230, 75, 53), (77, 187, 213), (0, 160, 135), (243, 155, 127), (60, 84, 136), (145, 209, 194),
    (231, 41, 138), (126, 97, 72), (200, 170, 220), (250, 200, 40), (132, 80, 180), (90, 200, 80),
)  # fmt: skip
SHADES = ((0.6, 0.5), (0.5, 0.95), (0.9, 0.75))  # saturation and brightness of the classes after these, in turn
GOLDEN = (5**0.5 - 1) / 2  # of the circle of hues: steps that come near no earlier one
BEGIN = 0.225  # where on it the first 21 classes are farthest apart
GREY: Colour = (128, 128, 128)  # what is ignored


def colour_of(index: int) -> Colour:
    """The colour of a class by its number, none twice."""
    if index < len(FIRST):
        return FIRST[index]
    saturation, brightness = SHADES[index % len(SHADES)]
    red, green, blue = hsv_to_rgb((BEGIN + index * GOLDEN) % 1, saturation, brightness)
    return round(255 * red), round(255 * green), round(255 * blue)


def in_hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
