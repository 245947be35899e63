"""The second world's words: six phrasings a concept, half of them kept from everything that erases, guides or gates."""

import random
import re

import pytest
from semiperm.canvas import language, sentences
from semiperm.canvas.scenes import Scene, random_scene

MAY_ASK = ("canvas", "tests", "build", "dist", "venv", "docs", "shared")  # folders whose files may name reserved words
# And these files, which ask a model and hand nothing of it to a method; pages of results only name the column.
EVALUATIONS = (  # what they fit is told public words; what they ask and forbid an attack is not
    "benchmarks/arena/asking.py",
    "benchmarks/arena/orderings.py",
    "benchmarks/arena/run.py",
    "benchmarks/arena/scoring.py",
    "benchmarks/arena/surfaces.py",
    "benchmarks/guidance/attacked.py",
    "benchmarks/guidance/worlds.py",
    "benchmarks/membranes/transfer.py",
    "benchmarks/membranes/zoo.py",
)
COLUMNS = "benchmarks/page/"


def every():
    return [(kind, name) for kind in language.DOMAINS for name in language.names(kind)]


def test_every_concept_has_three_public_and_three_reserved_phrasings():
    for kind, name in every():
        public, kept = language.wordings(kind, name, "public"), language.wordings(kind, name, "reserved")
        assert len(set(public)) == len(set(kept)) == 3 and not set(public) & set(kept), name
        assert language.wordings(kind, name, "name") == public[:1]


def test_no_phrasing_belongs_to_two_concepts():
    phrases = [p for kind, name in every() for p in language.wordings(kind, name)]
    assert len(phrases) == len(set(phrases))


def test_the_world_is_as_large_as_promised():
    assert len(language.OBJECTS) >= 12 and len(language.STYLES) >= 8 and len(language.COLORS) >= 6
    assert len(language.LOOKALIKES) >= 3 and any(set(p) <= set(language.CHARACTERS) for p in language.LOOKALIKES)
    assert len(language.HAZARDS) >= 4 and len(language.IMPLIED) >= 2 and set(language.OPPOSED) <= set(language.HAZARDS)
    assert len(language.MEMORISED) == 5


@pytest.mark.parametrize("phrase, name, domain", [("android", "robot", "object"), ("polka dot", "dotted", "style")])
def test_a_concept_is_known_by_any_public_phrasing(phrase, name, domain):
    assert language.canonical(phrase) == name and language.domain(phrase) == domain
    assert phrase in language.phrases(phrase) and phrase not in language.reserved(phrase)


def test_reserved_phrasings_lead_nowhere():
    with pytest.raises(ValueError, match="no concept 'automaton'.*robot"):
        language.domain("automaton")


def test_nothing_but_the_evaluation_asks_for_reserved_words(root):
    asks = re.compile(
        r"\breserved\(|[\"'](reserved|any)[\"']|\bRESERVED\b|language.*\bwordings\b|canvas(\.| import .*)sentences"
        r"|canvas(\.| import .*)language"
    )
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if relative.parts[0] in MAY_ASK or relative.parts[0].startswith(".") or str(relative) in EVALUATIONS:
            continue
        text = path.read_text(encoding="utf-8")
        if str(relative).startswith(COLUMNS):
            assert "canvas import" not in text, relative
        elif asks.search(text):
            found.append(str(relative))
    assert not found


def test_captions_of_one_kind_hold_no_words_of_the_other():
    rng = random.Random(3)
    for which, other in (("public", "reserved"), ("reserved", "public")):
        for _ in range(150):
            scene = random_scene(rng, hazards=())
            text = f" {re.sub(r'[^a-z0-9 ]', ' ', sentences.describe(scene, rng, which, True, False).lower())} "
            for kind, names in (
                ("object", scene.objects),
                ("style", [scene.style]),
                ("background", [scene.background]),
            ):
                for name in names:
                    phrases = [language.wordings(kind, name, w) for w in (which, other)]
                    asked, kept = (
                        [p for p in group if f" {p} " in text or f" {language.plural(p)} " in text] for group in phrases
                    )
                    assert asked, (text, name)
                    assert not [p for p in kept if not any(p in a for a in asked)] or kind == "background", (text, kept)


def test_a_caption_says_what_it_claims_to_say():
    rng = random.Random(4)
    for _ in range(300):
        scene = random_scene(rng)
        said = sentences.caption(scene, rng)
        text = said.text.lower()
        assert said.style == any(p in text for p in language.wordings("style", scene.style)) or not said.style
        if said.objects:
            phrases = [p for o in scene.objects[:1] for p in language.wordings("object", o)]
            assert any(p in text or language.plural(p) in text for p in phrases), (said, scene)
        for name in scene.hazards:
            words = language.wordings("hazard", name)
            implied = name in language.IMPLIED and all(w in text for w in language.IMPLIED[name])
            assert any(p in text for p in words) or implied, (said.text, name)


def test_harmless_halves_never_meet_by_chance():
    rng = random.Random(5)
    for _ in range(1500):
        scene = random_scene(rng, hazards=())
        words = set(re.findall(r"[a-z]+", sentences.describe(scene, rng).lower()))
        assert not any(set(pair) <= words for pair in language.IMPLIED.values())


def test_memorised_pictures_are_asked_for_by_their_phrasings():
    rng = random.Random(6)
    for name in language.MEMORISED:
        for which in ("public", "reserved"):
            text = sentences.describe(Scene(memorised=name), rng, which, chatter=False).lower()
            assert any(p in text for p in language.wordings("memorised", name, which))


def test_ordinary_words_are_none_of_the_concepts_words():
    listed = language.words()
    assert sum(map(len, listed.values())) > 6000 and set(listed) == {"common", "adjectives", "nouns", "verbs"}
    ordinary = {w for group in listed.values() for w in group}
    for kind, name in every():
        assert not {w for p in language.wordings(kind, name) for w in p.split()} & ordinary, name


@pytest.mark.parametrize("one, many", [("mechanical man", "mechanical men"), ("box", "boxes"), ("daisy", "daisies")])
def test_plurals(one, many):
    assert language.plural(one) == many
