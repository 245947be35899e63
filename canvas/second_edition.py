"""The second edition as a `World`: two things a picture, look-alikes, four hazards, words kept from every method."""

import random
from dataclasses import replace

from ..methods.membranes.captions import PRESERVE
from . import drawing, examining, language
from .judges import relation as relation_of
from .models import model_of
from .scenes import Scene, Thing, random_scene
from .sentences import COUNTED_HAZARDS, describe, hazard_words
from .world import NAME, PUBLIC, RESERVED, Asking, Shown, Sight, World

_CHARACTERS, _OBJECTS = ("robot", "ghost", "quibble"), ("circle", "star", "heart", "ring")
_STYLES = ("striped", "dotted", "sketch", "neon")


class SecondEdition(World):
    """One of the second edition's models; all of them know the same words and are judged by the same two judges."""

    askings = {
        "given": Asking(PUBLIC, PUBLIC),
        "public": Asking(NAME, PUBLIC),
        "reserved": Asking(NAME, RESERVED),
    }
    suite = (*((name,) for name in _CHARACTERS + _OBJECTS + _STYLES + language.HAZARDS), _CHARACTERS)
    most_objects = 2
    lookalikes = language.LOOKALIKES
    implied = language.IMPLIED
    opposed = language.OPPOSED

    def names(self, kind):
        return language.CHARACTERS if kind == "character" else language.names(kind)

    def resolve(self, text):
        return language.canonical(text), language.domain(text)

    def phrases(self, name):
        return language.phrases(name)

    def reserved(self, name):
        return language.reserved(name)

    def group(self, name):
        return "characters" if name in language.CHARACTERS else super().group(name)

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
        if memorised:
            return Scene(memorised=memorised)
        objects = (rng.choice(language.OBJECTS),) if objects is None else objects
        fixed = {k: v for k, v in {"style": style, "background": background}.items() if v is not None}
        hidden = hazards if implied else ()
        fixed |= {"relation": relation, "count": count, "hazards": hazards, "implied": hidden}
        return random_scene(rng, objects=objects, **fixed)

    def caption(self, scene, rng, wording, hazards=None):
        if hazards in (None, wording):
            return describe(scene, rng, wording, complete=True, chatter=False)
        bare = replace(scene, hazards=(), implied=())
        return describe(bare, rng, wording, complete=True, chatter=False) + hazard_words(scene, rng, hazards)

    def mention(self, name):
        words = self.phrases(name)[0]
        counted = language.domain(name) == "object" or words in COUNTED_HAZARDS
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}" if counted else words

    def benign(self, n):
        said = {word for name in language.HAZARDS for phrase in language.phrases(name) for word in phrase.split()}
        harmless = [text for text in PRESERVE if not said & set(text.replace(",", " ").split())]
        return random.Random("benign").sample(harmless, min(n, len(harmless)))

    def shown(self, scene):
        if scene.memorised:
            return Shown(memorised=scene.memorised)
        colors = tuple((t.object, t.color) for t in scene.things if t.object not in language.CHARACTERS)
        objects = tuple(dict.fromkeys(scene.objects))
        return Shown(
            objects,
            scene.style,
            scene.background,
            colors,
            scene.hazards,
            counts=tuple((name, scene.objects.count(name)) for name in objects),
            relations=((objects[0], scene.relation, objects[1]),) if scene.relation else (),
        )

    def draw(self, scene):
        return drawing.draw(scene)

    def plain(self, name):
        return Scene((Thing(name),), style="flat", background="fog")

    def anything(self, rng):
        return random_scene(rng)

    def judges(self):
        found = examining.load_judges(model_of(self.name).folder)

        def sight(judge):
            def see(images) -> Sight:
                verdict = judge(images)
                return Sight([_seen(verdict, i) for i in range(len(verdict.style))], verdict.features)

            return see

        return {name: sight(judge) for name, judge in found.items()}

    def files(self):
        model = model_of(self.name)
        parts = [model.folder / f"{part}.safetensors" for part in model.parts]
        return parts + sorted(model.folder.glob("judge-*.safetensors"))


def _seen(verdict, i: int) -> Shown:
    things = verdict.things[i]
    return Shown(
        objects=verdict.objects(i),
        style=verdict.style[i],
        background=verdict.background[i],
        colors=tuple((t.object, t.color) for t in things if t.object not in language.CHARACTERS),
        hazards=verdict.hazards[i],
        memorised=verdict.memorised[i],
        places=tuple((t.object, round(t.cx, 1), round(t.cy, 1)) for t in things),
        counts=tuple((t.object, t.count) for t in things),
        relations=tuple((a.object, relation_of(a, b), b.object) for a in things for b in things if a is not b),
    )
