"""The first edition as a `World`: one object a picture, one hazard, and no look-alikes.

Its phrasings are all public; an evaluation of withheld words keeps all but the plain names from the methods.
"""

import random

from . import captions, judge, render
from .models import model_of
from .world import NAME, PUBLIC, RESERVED, Asking, Shown, Sight, World

_TABLES = {
    "object": captions.OBJECTS,
    "style": captions.STYLES,
    "color": captions.COLORS,
    "background": captions.BACKGROUNDS,
    "hazard": captions.HAZARD,
}
_CHARACTERS, _OBJECTS = captions.CHARACTERS, ("circle", "star", "heart")
_STYLES = ("striped", "dotted", "sketch", "neon")
_SYNONYMS = {NAME: False, PUBLIC: True, RESERVED: "only"}


class FirstEdition(World):
    """The embedded UNet of one object a picture."""

    askings = {"given": Asking(PUBLIC, PUBLIC), "withheld": Asking(NAME, RESERVED)}
    suite = (*((name,) for name in _CHARACTERS + _OBJECTS + _STYLES), _CHARACTERS)

    def names(self, kind):
        if kind in ("character", "memorised"):
            return _CHARACTERS if kind == "character" else (captions.MEMORISED,)
        return tuple(_TABLES[kind])

    def resolve(self, text):
        if text in (captions.MEMORISED, captions.MEMORISED_CAPTION):
            return captions.MEMORISED, "memorised"
        return captions.canonical(text), captions.domain(text)

    def phrases(self, name):
        return (captions.MEMORISED_CAPTION,) if name == captions.MEMORISED else captions.phrases(name)

    def reserved(self, name):
        return self.phrases(name)[1:]

    def scene(
        self,
        rng,
        *,
        objects=None,
        style=None,
        background=None,
        hazards=(),
        implied=False,
        relation=None,
        count=1,
        memorised="",
    ):
        if implied or len(objects or ("",)) > 1 or count != 1:
            raise ValueError(
                f"a picture of {self.name} holds one object, and hazards that are named; got {objects}, count={count}"
            )
        if memorised:
            return render.random_scene(rng, object=memorised, hazard=False)
        fixed = {"object": objects and objects[0], "style": style, "background": background}
        return render.random_scene(rng, hazard=bool(hazards), **{k: v for k, v in fixed.items() if v is not None})

    def caption(self, scene, rng, wording, hazards=None):
        fields = {name: getattr(scene, name) for name in scene.__dataclass_fields__}
        bare = render.Scene(**{**fields, "hazard": False})
        text = captions.caption(bare, rng, synonyms=_SYNONYMS[wording], complete=True)
        if not scene.hazard:
            return text
        named = {NAME: slice(1), PUBLIC: slice(None), RESERVED: slice(1, None)}[hazards or wording]
        word = random.Random(f"hazard-{text}").choice(captions.HAZARD["hazard"][named])  # scenes stay as without it
        return text + captions.hazard_suffix(word)

    def mention(self, name):
        return f"a {self.phrases(name)[0]}"

    def benign(self, n):
        return captions.preserve(leave_out=["hazard"], n=n, seed=99)

    def shown(self, scene):
        if scene.object == captions.MEMORISED:
            return Shown(memorised=scene.object)
        colors = () if scene.object in _CHARACTERS else (("", scene.color),)
        hazards = ("hazard",) if scene.hazard else ()
        return Shown((scene.object,), scene.style, scene.background, colors, hazards)

    def draw(self, scene):
        return render.render(scene)

    def plain(self, name):
        return render.Scene(object=name, style="flat", background="fog")

    def anything(self, rng):
        return render.random_scene(rng)

    def judges(self):
        judged = judge.Judge.load()

        def see(images) -> Sight:
            verdict = judged(images)
            rows = zip(verdict.object, verdict.style, verdict.color, verdict.background, verdict.hazard, strict=True)
            return Sight([_seen(*row) for row in rows], verdict.features)

        return {"first": see}

    def files(self):
        model = model_of(self.name)
        return [model.folder / f"{part}.safetensors" for part in (*model.parts, "judge")]


def _seen(name: str, style: str, color: str, background: str, hazard: bool) -> Shown:
    objects = (name,) if name in captions.OBJECTS else ()
    memorised = name if name == captions.MEMORISED else ""
    return Shown(objects, style, background, (("", color),), ("hazard",) if hazard else (), memorised)
