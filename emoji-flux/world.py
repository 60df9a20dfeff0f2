"""The world that emoji-flux knows: 57 things x 3 styles x 8 backgrounds, a scene in under a millisecond.

    python emoji-flux/world.py                 # writes docs/world.png, random scenes with their captions

A scene holds one thing, two side by side, a framed picture on a wall, or nothing. It knows its own masks and
boxes, so that it can train and score a detector, a segmenter and a judge. The artwork is `sprites.png`, one
column per thing and one row per style, that is, artwork family (licences: README.md).
"""
import argparse
import functools
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
MAX_WORDS = 19  # of the longest caption; with their special tokens T5 reads 20, CLIP 21
SIZE = 64  # pixels, the side of a scene and of a sprite in the atlas
THING = 30  # pixels, the side of a thing in a scene; it stands in a cell of 4 x 4 tokens (32 pixels)

# name -> Unicode code point of its emoji; build.py cuts the atlas in this order
ANIMALS = dict(
    cat="1f431", dog="1f436", tiger="1f42f", lion="1f981", rabbit="1f430", fox="1f98a", bear="1f43b",
    wolf="1f43a", mouse="1f42d", panda="1f43c", frog="1f438", turtle="1f422", horse="1f434", zebra="1f993",
    unicorn="1f984", deer="1f98c", cow="1f42e", pig="1f437", monkey="1f435", bird="1f426", eagle="1f985",
    owl="1f989", duck="1f986", penguin="1f427", parrot="1f99c", fish="1f420")
VEHICLES = dict(
    airplane="2708", helicopter="1f681", rocket="1f680", automobile="1f697", taxi="1f695", bus="1f68c",
    truck="1f69a", tractor="1f69c", ship="1f6a2", sailboat="26f5", speedboat="1f6a4", bicycle="1f6b2",
    train="1f686")
OTHERS = dict(pizza="1f355", apple="1f34e", banana="1f34c", tree="1f333", cactus="1f335", sunflower="1f33b",
              house="1f3e0", guitar="1f3b8", umbrella="2614")
CHARACTERS = dict(ghost="1f47b", robot="1f916", alien="1f47d", snowman="26c4", clown="1f921", ogre="1f479")
HAZARDS = dict(bomb="1f4a3", knife="1f52a", dynamite="1f9e8")
CODES = ANIMALS | VEHICLES | OTHERS | CHARACTERS | HAZARDS
NAMES = list(CODES)
# style (an artwork family) -> ways to say it: first the one that prompts use, then paraphrases
STYLES = {
    "noto": ("in noto style", "drawn with soft google shapes", "as a gentle google picture"),
    "twemoji": ("in twemoji style", "drawn with plain flat fills", "as a simple twitter picture"),
    "fluent": ("in fluent style", "rendered with glossy plastic shading", "as a glossy rendered sculpture"),
}
BACKGROUNDS = dict(
    white=(250, 250, 248), gray=(150, 152, 156), blue=(120, 176, 236), green=(132, 206, 134),
    yellow=(248, 222, 110), pink=(246, 172, 200), orange=(244, 164, 92), purple=(168, 136, 214))

def phrase(name):
    """'cat' -> 'a cat', 'owl' -> 'an owl'."""
    return ("an " if name[0] in "aeo" or name == "umbrella" else "a ") + name

@functools.cache
def paraphrases():
    """{name: [phrases that share no word with it]}, from the [paraphrases] section of prompts/NAME.txt."""
    found = {}
    for name in NAMES:
        text = (HERE / "prompts" / f"{name}.txt").read_text()
        section = text.split("[paraphrases]\n")[1].split("\n[")[0]
        found[name] = [line for line in section.splitlines() if line.strip()]
    return found

@functools.cache
def _atlas():
    return Image.open(HERE / "sprites.png").convert("RGBA")

@functools.cache
def sprite(name, style):
    """-> float32 (30, 30, 4): RGB in [0, 255] and alpha in [0, 1], not premultiplied."""
    column, row = NAMES.index(name) * SIZE, list(STYLES).index(style) * SIZE
    art = _atlas().crop((column, row, column + SIZE, row + SIZE))
    # "RGBa" is premultiplied: no dark fringe from transparent pixels
    art = art.convert("RGBa").resize((THING, THING), Image.LANCZOS).convert("RGBA")
    out = np.asarray(art).astype(np.float32)
    out[..., 3] /= 255
    return out

def wall(background):
    """-> float32 (64, 64, 3): the background colour, a little darker towards the bottom."""
    shade = np.linspace(1.04, 0.92, SIZE, dtype=np.float32)[:, None, None]
    return np.minimum(np.float32(BACKGROUNDS[background]) * shade, 255) * np.ones((1, SIZE, 1), np.float32)

def paste(canvas, name, style, x, y, opacity=1.0):
    """Composite a thing centred at (x, y) onto canvas (64, 64, 3), in place -> its mask, bool (64, 64)."""
    art = sprite(name, style)
    top, left = y - THING // 2, x - THING // 2
    mask = np.zeros((SIZE, SIZE), bool)
    window = np.s_[top:top + THING, left:left + THING]
    alpha = art[..., 3:] * opacity
    canvas[window] += alpha * (art[..., :3] - canvas[window])
    mask[window] = art[..., 3] > 0.5
    return mask

def box(mask):
    """bool (64, 64) -> (x0, y0, x1, y1) in pixels, the last two exclusive."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1

def draw(rng, names=None, style=None, background=None, framed=None, opacity=1.0):
    """Draw a scene; what is not given is chosen by rng, and half of the scenes then hold two things.

    -> dict: image uint8 (64, 64, 3), names (tuple of 0-2, left to right), style, background, framed,
    masks (a bool (64, 64) for each name), boxes (the same, in pixels), frame (box or None).
    """
    kind = rng.choice(4, p=[0.38, 0.5, 0.09, 0.03])  # one, two, framed, empty
    if names is None:
        count = (1, 2, 1, 0)[kind]
        names = [NAMES[i] for i in rng.choice(len(NAMES), count, replace=False)]
        framed = kind == 2
    style = style or list(STYLES)[rng.integers(len(STYLES))]
    background = background or list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    canvas = wall(background)
    # one size, and shifts by whole tokens of the transformer (8 pixels): a thing has the same latents
    # wherever it stands, so that the model has a sixth of the patterns to learn
    dx, dy = 8 * rng.integers(-1, 2, 2)
    frame = None
    if framed:  # a wooden frame around cream paper
        frame = (int(12 + dx), int(12 + dy), int(52 + dx), int(52 + dy))
        canvas[frame[1]:frame[3], frame[0]:frame[2]] = (122, 78, 40)
        canvas[frame[1] + 4:frame[3] - 4, frame[0] + 4:frame[2] - 4] = (248, 242, 224)
    spots = [(32 + dx, 32 + dy)] if len(names) == 1 else [(16, 32 + dx), (48, 32 + dy)]
    masks = [paste(canvas, name, style, *spot, opacity) for name, spot in zip(names, spots)]
    image = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return dict(image=image, names=tuple(names), style=style, background=background, framed=bool(framed),
                masks=masks, boxes=[box(m) for m in masks], frame=frame)

def caption(scene, rng, paraphrase=0.2, full=False):
    """A sentence of the grammar for a scene. Style and background are left out at random unless full."""
    names = scene["names"]
    said = []
    for name in names:
        other = paraphrases()[name]
        said.append(other[rng.integers(len(other))] if rng.random() < paraphrase else phrase(name))
    thing = " and ".join(said)
    where = phrase(scene["background"]) + " background"
    ways = STYLES[scene["style"]]
    style = ways[0 if full or rng.random() < 0.8 else rng.integers(len(ways))]
    parts = [f"on {where}" if full or rng.random() < 0.7 else "", style if full or rng.random() < 0.7 else ""]
    if scene["framed"]:
        return " ".join(f"a painting of {thing} {parts[1]} on the wall".split())
    if not names:
        return where
    while len((sentence := " ".join(f"{thing} {' '.join(parts)}".split())).split()) > MAX_WORDS:
        parts.pop()  # two paraphrases leave no room for the style, or for the background either
    return sentence

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/world.png", help="where the sheet of scenes goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.error = lambda why: parser.exit(2, f"error: {why}\n")  # one line, without the usage
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: must not be negative")
    rng = np.random.default_rng(args.seed)
    sheet = Image.new("RGB", (8 * 160, 5 * 180), "white")
    pen = ImageDraw.Draw(sheet)
    for i in range(40):
        scene = draw(rng)
        x, y = 160 * (i % 8), 180 * (i // 8)
        sheet.paste(Image.fromarray(scene["image"]).resize((128, 128), Image.NEAREST), (x + 16, y))
        pen.text((x + 16, y + 129), textwrap.fill(caption(scene, rng), 28), fill="black", font_size=9)
    try:
        sheet.save(args.out)
    except (OSError, ValueError) as error:
        parser.error(f"--out {args.out}: {error}")
    print(f"{args.out}: {len(NAMES)} things, {len(STYLES)} styles, {len(BACKGROUNDS)} backgrounds")

if __name__ == "__main__":
    main()
