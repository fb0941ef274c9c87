"""Paint small ArtGANs: five styles that really differ, in ArtGAN's folders and kind of names."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ARTISTS = ("anna-ruiz", "ben-okafor", "chiyo-mori", "dora-lindt", "emil-varga", "fatima-zand")


def paint_dabs(random, draw, width, height):
    """Impressionism: short slanted strokes, sky above water, in broken pastel colours."""
    for _ in range(900):
        x, y = random.uniform(0, width), random.uniform(0, height)
        base = (150, 180, 220) if y < height / 2 else (110, 160, 130)
        colour = tuple(int(c + random.normal(0, 30)) % 256 for c in base)
        length = width / 18
        draw.line((x, y, x + length, y - length / 4), fill=colour, width=max(2, width // 60))


def paint_fields(random, draw, width, height):
    """Color Field Painting: two or three broad saturated bands on a ground."""
    draw.rectangle((0, 0, width, height), fill=tuple(random.integers(60, 255, 3).tolist()))
    bands = int(random.integers(2, 4))
    for band in range(bands):
        top = height * (band + 0.12) / bands
        bottom = height * (band + 0.88) / bands
        colour = tuple(random.integers(0, 255, 3).tolist())
        draw.rectangle((width * 0.08, top, width * 0.92, bottom), fill=colour)


def paint_facets(random, draw, width, height):
    """Cubism: overlapping angular facets in browns and greys, with dark edges."""
    for _ in range(70):
        x, y = random.uniform(0, width), random.uniform(0, height)
        tone = int(random.integers(60, 200))
        colour = (tone, int(tone * 0.85), int(tone * 0.65))
        corners = [(x + random.normal(0, width / 7), y + random.normal(0, height / 7))
                   for _ in range(int(random.integers(3, 5)))]
        draw.polygon(corners, fill=colour, outline=(40, 32, 24))


def paint_dots(random, draw, width, height):
    """Pointillism: a canvas full of small round dots of pure colours."""
    draw.rectangle((0, 0, width, height), fill=(240, 235, 220))
    colours = ((230, 60, 40), (40, 90, 200), (250, 210, 40), (40, 150, 70), (240, 130, 30))
    step = max(4, width // 40)
    for y in range(0, height, step):
        for x in range(0, width, step):
            colour = colours[int(random.integers(len(colours)))]
            radius = step * random.uniform(0.25, 0.45)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def paint_waves(random, draw, width, height):
    """Ukiyo-e: flat blue waves with dark outlines under a pale sky with a red sun."""
    draw.rectangle((0, 0, width, height), fill=(238, 225, 196))
    x, y, radius = random.uniform(0.2, 0.8) * width, 0.2 * height, width / 10
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(200, 50, 40))
    phase = random.uniform(0, 2 * math.pi)
    for row in range(5):
        level = height * (0.4 + 0.13 * row)
        crest = [(x, level + height * 0.05 * math.sin(phase + row + x * 12 / width))
                 for x in range(0, width + 8, 8)]
        colour = (30 + 22 * row, 80 + 22 * row, 150)
        draw.polygon([*crest, (width, height), (0, height)], fill=colour)
        draw.line(crest, fill=(20, 30, 60), width=max(2, width // 90))


STYLES = {
    "Color_Field_Painting": paint_fields,
    "Cubism": paint_facets,
    "Impressionism": paint_dabs,
    "Pointillism": paint_dots,
    "Ukiyo_e": paint_waves,
}


def paint(style, seed, size=(320, 256)):
    """Return a painting of a style as an RGB image, the same for the same seed."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(random.integers(150, 230, 3).tolist()))
    STYLES[style](random, ImageDraw.Draw(image), *size)
    noise = random.normal(0, 6, (size[1], size[0], 3))
    canvas = (np.asarray(image.filter(ImageFilter.SMOOTH)) + noise).clip(0, 255)
    return Image.fromarray(canvas.astype(np.uint8))


def paint_artgan(folder, each=60, styles=tuple(STYLES), size=(320, 256), seed=0):
    """Paint `each` paintings of each style into `folder`/<Style>/; return {"Style/name": style}.

    An artist paints mostly in one style and at times in another, as in ArtGAN.
    """
    painted = {}
    for number, style in enumerate(styles):
        (Path(folder) / style).mkdir(parents=True, exist_ok=True)
        for title in range(each):
            random = np.random.default_rng((seed, number, title))
            favourite = number if random.random() < 0.75 else int(random.integers(len(ARTISTS)))
            name = f"{ARTISTS[favourite % len(ARTISTS)]}_study-no-{title + 1}-{1870 + title}.jpg"
            path = f"{style}/{name}"
            paint(style, (seed, number, title), size).save(Path(folder) / path, quality=88)
            painted[path] = style
    return painted


def write_lists(folder, attribute, class_names, train, test):
    """Write the three lists of an attribute as ArtGAN's zip has them, from rows (path, label)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", train), ("val", test)):
        text = "".join(f"{path},{label}\r\n" for path, label in rows)
        (folder / f"{attribute}_{part}.csv").write_bytes(text.encode("utf-8"))
    text = "".join(f"{label} {name}\n" for label, name in enumerate(class_names))
    (folder / f"{attribute}_class.txt").write_bytes(text.encode("utf-8"))
