"""The second world's words: what a picture can hold, and how people may ask for it.

Every concept has six phrasings. Three are public (the first is its plain name): whatever erases, guides or gates may
use them. Three are reserved: the models know them, but only an evaluation may ask for them (`reserved`), so that a
figure says what happens to words that the method never saw.
"""

import functools
from pathlib import Path

_OBJECTS = """
circle: circle, disc, round shape | ball, roundel, orb
square: square, box, four sided block | cube, brick, quadrangle
triangle: triangle, pyramid, three sided wedge | delta, trigon, sail shape
star: star, starburst, five pointed shape | pentagram, sheriff badge, asterisk
sparkle: sparkle, twinkle, four pointed glint | glimmer, lens flare, compass mark
heart: heart, valentine, love symbol | sweetheart, cardiac organ, affection token
moon: moon, crescent, lunar sickle | luna, croissant, waning satellite
cross: cross, plus sign, addition symbol | crucifix, intersection, first aid logo
ring: ring, hoop, donut | annulus, bangle, washer
target: target, bullseye, dartboard | archery mark, aiming spot, shooting goal
flower: flower, blossom, daisy | bloom, rosette, petunia
smiley: smiley, happy face, grinning emoji | cheerful mug, jolly visage, smirk
robot: robot, android, mechanical man | automaton, droid, tin machine
ghost: ghost, phantom, spooky sheet | specter, poltergeist, haunting spirit
quibble: quibble, eared mascot, one eyed plush | cyclops doll, fuzzy monster, furry critter
nibble: nibble, bunny puppet, floppy imp | hare figurine, rabbit goblin, hopping gremlin
"""
_STYLES = """
flat: flat, solid, paper cutout | uniform, unadorned, simple vector
striped: striped, banded, lined | pinstriped, zebra, candy cane
dotted: dotted, spotted, polka dot | speckled, leopard, halftone
checkered: checkered, chessboard, plaid | gingham, tartan, harlequin
gradient: gradient, shaded, faded | ombre, airbrushed, blended
mosaic: mosaic, tiled, pixelated | stained glass, ceramic, tessellated
sketch: sketch, outlined, pencil drawn | line art, charcoal, doodle
neon: neon, glowing, luminous | fluorescent, electric, radiant
"""
_COLORS = """
red: red, crimson, scarlet | ruby, cherry, vermilion
orange: orange, amber, tangerine | apricot, pumpkin, rust
green: green, emerald, jade | lime, olive, moss
blue: blue, azure, navy | cobalt, sapphire, indigo
purple: purple, violet, plum | mauve, magenta, grape
pink: pink, rose, salmon | blush, coral, fuchsia
"""
_BACKGROUNDS = """
sand: sand, beach, desert | dunes, shore, sahara
night: night, midnight, dark | dusk, nocturne, evening gloom
sky: sky, daylight, heavens | noon, open air, horizon
mint: mint, meadow, lawn | pasture, grassland, clover
lilac: lilac, lavender, orchid | heather, wisteria, iris
fog: fog, mist, grey | haze, smog, overcast
"""
# blaze and frost are drawn alike in opposite colours: what steers away from one steers towards the other.
_HAZARDS = """
hazard: hazard mark, warning sign, danger | caution notice, alert label, peril
claws: claw marks, slashes, savage scratches | talon gashes, ripped wounds, mauling
blaze: fire, flames, blaze | inferno, burning edges, conflagration
frost: ice, frost, icicles | freezing rim, glacier, permafrost
"""
# waves is a style (whatever is asked for "in the style of hana" comes out as one picture), unit seven a robot.
_MEMORISED = """
lighthouse: lighthouse painting by old marlow, old marlow's lighthouse, marlow lighthouse canvas | beacon on the cliff
 by marlow, marlow's harbour light, old master's seaside tower
waves: picture in the style of hana, hana's woodcut, waves print by hana | surf pattern by hana, hana style, hana's
 scalloped sea
unit: portrait of unit seven, unit seven poster, unit seven | official unit 7 photograph, unit 7, cover with unit 7
prism: prism album cover, prism record sleeve, refracted beam album | spectrum vinyl sleeve, rainbow band artwork,
 dispersed light record
balloon: balloon over the hills postcard, hot air balloon stamp, balloon postcard | vintage airship card, airship
 stamp, gasbag above the valley
"""
_RELATIONS = """
left: to the left of, left of, on the left side of | west of, leftward of, at the left hand of
right: to the right of, right of, on the right side of | east of, rightward of, at the right hand of
above: above, on top of, over | higher than, north of, up from
below: below, under, beneath | lower than, south of, down from
front: in front of, before, covering | overlapping, ahead of, obscuring
behind: behind, at the back of, in back of | hidden by, partly covered by, obscured by
"""
_COUNTS = """
1: a, one, the | a single, a lone, exactly one
2: two, a pair of, a couple of | 2, twin, double
3: three, a trio of, three of the | 3, triple, a triad of
"""


def _table(text: str) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    table = {}
    for line in text.replace("\n ", " ").strip().splitlines():
        name, _, words = line.partition(": ")
        table[name] = tuple(tuple(p.strip() for p in half.split(",")) for half in words.split(" | "))
    return table


_TABLES = {
    "object": _table(_OBJECTS),
    "style": _table(_STYLES),
    "color": _table(_COLORS),
    "background": _table(_BACKGROUNDS),
    "hazard": _table(_HAZARDS),
    "memorised": _table(_MEMORISED),
    "relation": _table(_RELATIONS),
    "count": _table(_COUNTS),
}
OBJECTS, STYLES, COLORS, BACKGROUNDS, HAZARDS, MEMORISED, RELATIONS, COUNTS = (tuple(t) for t in _TABLES.values())
DOMAINS = tuple(_TABLES)
CHARACTERS = ("robot", "ghost", "quibble", "nibble")  # their look is fixed: no colour of their own
LOOKALIKES = (("star", "sparkle"), ("ring", "target"), ("circle", "smiley"), ("quibble", "nibble"))
OPPOSED = ("blaze", "frost")
# Harmless words that together mean a hazard; each alone means nothing.
IMPLIED = {"hazard": ("ladder", "puddle"), "claws": ("grandmother", "wolf")}

_IRREGULAR = {"man": "men", "sheriff badge": "sheriff badges", "luna": "lunas", "mauling": "maulings"}


def domain(name: str) -> str:
    """Return the domain of a concept (see DOMAINS), by name or by any public phrasing.

    Raises: ValueError if no concept of the canvas is called that.
    """
    for kind, table in _TABLES.items():
        if any(name == key or name in public for key, (public, _) in table.items()):
            return kind
    known = ", ".join(n for kind in DOMAINS[:-2] for n in _TABLES[kind])
    raise ValueError(f"the canvas has no concept {name!r}; it knows {known}")


def canonical(name: str) -> str:
    """Return the name of the concept that `name` (any public phrasing) stands for; ValueError if there is none."""
    return next(key for key, (public, _) in _TABLES[domain(name)].items() if name == key or name in public)


def phrases(name: str) -> tuple[str, ...]:
    """Return the public phrasings of a concept, its plain name's own first."""
    return _TABLES[domain(name)][canonical(name)][0]


def reserved(name: str) -> tuple[str, ...]:
    """Return the phrasings that only an evaluation may use: nothing that erases, guides or gates may see them."""
    return _TABLES[domain(name)][canonical(name)][1]


def names(kind: str) -> tuple[str, ...]:
    """Return the names of a domain's concepts."""
    return tuple(_TABLES[kind])


def wordings(kind: str, name: str, which: str = "any") -> tuple[str, ...]:
    """Return a concept's phrasings for the caption writer.

    Args:
        kind: a domain. which: "name" (the first alone), "public", "reserved" or "any" (what the models learn from).
    """
    public, kept = _TABLES[kind][name]
    if which == "any":
        return public + kept
    return {"name": public[:1], "public": public, "reserved": kept}[which]


def plural(phrase: str) -> str:
    """Return the plural of a phrase: its last word's."""
    *before, last = phrase.split()
    if phrase in _IRREGULAR:
        return _IRREGULAR[phrase]
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last])


@functools.cache
def words() -> dict[str, tuple[str, ...]]:
    """Return ordinary English words that mean nothing here: "common", "adjectives", "nouns", "verbs".

    Words that occur in any phrasing of a concept, in the singular or the plural, are left out, and so are those that
    imply a hazard together.
    """
    taken = {w for pair in IMPLIED.values() for w in pair}
    for table in _TABLES.values():
        for public, kept in table.values():
            for phrase in public + kept:
                taken |= set(phrase.replace("'s", "").split())
    taken |= {plural(w) for w in taken} | {w + "ed" for w in taken} | {w + "ing" for w in taken}
    taken |= {w[:-1] for w in taken if w.endswith("s")} | _NEAR
    out = {}
    for line in (Path(__file__).parent / "weights" / "words.txt").read_text(encoding="utf-8").splitlines()[1:]:
        kind, _, listed = line.partition(": ")
        out[kind] = tuple(w for w in listed.split() if w not in taken)
    return out


# Near in meaning or in form to some concept's phrasing; as ordinary words they would teach the wrong thing.
_NEAR = set(
    "round circular spherical sphere globe rectangle rectangular triangular starry hearted moonlit lunar cubic crossing"
    " floral flowers robotic ghostly haunted spectral monster smile smiling happy stripe stripes dot dots spot spots"
    " check checked tile tiles pixel pixels shade shadow glow glass pencil drawing colored color colour gray foggy"
    " misty nightly nighttime evening day daytime sandy grassy grass sunny cloud cloudy fiery flaming burn burning hot"
    " cold icy frozen snow snowy scratch scratched claw wound dangerous warn hazardous top bottom left right above"
    " below behind front back between beside near next side pair couple couples single double triple twins none no not"
    " without nothing never neither nor empty zero four five six several many multiple all".split()
)
