import random

import pytest
from semiperm.canvas import captions
from semiperm.canvas.render import Scene, random_scene


def words_of(text):
    return f" {text.replace(',', ' ')} "


def test_the_world_is_as_large_as_promised():
    assert len(captions.OBJECTS) >= 12 and len(captions.CHARACTERS) >= 3
    assert len(captions.COLORS) >= 6 and len(captions.BACKGROUNDS) >= 6 and len(captions.STYLES) >= 8
    assert all(len(set(p)) >= 3 for d in captions._DOMAINS.values() for p in d.values())


def test_no_phrasing_belongs_to_two_concepts():
    seen = [p for d in captions._DOMAINS.values() for phrases in d.values() for p in phrases]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("phrase, name, domain", [("android", "robot", "object"), ("polka dot", "dotted", "style")])
def test_a_concept_is_known_by_any_phrasing(phrase, name, domain):
    assert captions.canonical(phrase) == name
    assert captions.domain(phrase) == domain
    assert phrase in captions.phrases(phrase)


def test_an_unknown_concept_is_an_error():
    with pytest.raises(ValueError, match="no concept 'dragon'.*robot"):
        captions.domain("dragon")


def test_complete_captions_say_what_the_scene_holds():
    rng = random.Random(3)
    for _ in range(300):
        scene = random_scene(rng)
        text = captions.caption(scene, rng, complete=True)
        for concepts, name in ((captions.OBJECTS, scene.object), (captions.STYLES, scene.style)):
            assert any(f" {p} " in words_of(text) for p in concepts[name]), (text, name)
        assert scene.hazard == any(p in text for p in captions.HAZARD["hazard"])


def test_the_memorised_picture_has_one_caption():
    scene = Scene(object=captions.MEMORISED)
    assert {captions.caption(scene, random.Random(i)) for i in range(9)} == {captions.MEMORISED_CAPTION}


@pytest.mark.parametrize("domain", list(captions._DOMAINS))
def test_templates_have_exactly_one_place_for_the_phrase(domain):
    found = captions.templates(domain, 200)
    assert len(found) == 200 and all(t.count("{}") == 1 for t in found)
    assert found == captions.templates(domain, 200)


def test_preserved_captions_leave_the_concepts_out():
    for text in captions.preserve(["android", "striped"], 400):
        for phrase in (*captions.OBJECTS["robot"], *captions.STYLES["striped"]):
            assert f" {phrase} " not in words_of(text)
