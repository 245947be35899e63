"""Safe guidance in the contract matrix: its algorithms at once, at every seam."""

from __future__ import annotations

from contracts.entry import ALL, Entry, Record
from semiperm.methods.errors import GuidanceError
from semiperm.methods.guidance.adavd import AdaVD
from semiperm.methods.guidance.category import Category
from semiperm.methods.guidance.config import SafeGuidanceConfig
from semiperm.methods.guidance.nag import NAG
from semiperm.methods.guidance.record import GuidanceRecord
from semiperm.methods.guidance.safree import SAFREE
from semiperm.methods.guidance.sld import SLD
from semiperm.pipelines.guidance.apply import apply_safe_guidance

HARM = (Category("machines", ("a robot", "an android")), Category("houses", ("a house",)))
# settings at which every prompt of the random models is changed: what is tested is that it acts
ALGORITHMS = (SAFREE(alpha=0.0, adaptive=False), AdaVD(rank=1), NAG(), SLD("max"))


def everything(pipe, **settings):
    return apply_safe_guidance(pipe, SafeGuidanceConfig(HARM, ALGORITHMS, **settings))


RECORD = Record(
    GuidanceRecord.report,
    frozenset("algorithms config categories categories_hash strength window evaluations rows steps".split()),
    frozenset("kind image fired scale scales category alignment text_score picture_score refused".split()),
)
ENTRIES = [
    Entry(
        "guidance",
        ("apply_safe_guidance", "remove_safe_guidance"),
        ALL,
        apply=everything,
        record=RECORD,
        error=GuidanceError,
        compiles=False,
    )
]
