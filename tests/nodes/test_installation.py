"""What the pack says when ComfyUI loads it, without ComfyUI."""

import importlib
import logging
import sys

import comfy_stub
import pytest
from semiperm.methods import errors
from semiperm.methods.packages import install_command


@pytest.fixture
def installation(tmp_path, monkeypatch):
    for name in errors.__all__:
        monkeypatch.setattr(getattr(errors, name), "__module__", "a/path/to/semiperm.methods.errors")
    with comfy_stub.stand_in(tmp_path):
        yield importlib.import_module("semiperm.nodes.installation")


def test_a_missing_package_is_told_with_the_right_python(installation, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/opt/comfy ui/python")
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, "semiperm"):
        installation.check()
    (said,) = [record.getMessage() for record in caplog.records]
    assert "its nodes need cryptography" in said
    assert f'"/opt/comfy ui/python" -m pip install -r "{installation.REQUIREMENTS}"' in said


def test_where_nothing_is_missing_nothing_is_said(installation, caplog):
    with caplog.at_level(logging.WARNING, "semiperm"):
        installation.check()
    assert installation.missing() == [] and caplog.records == []
    assert {getattr(errors, name).__module__ for name in errors.__all__} == {"semiperm"}


def test_the_command_keeps_portable_pythons_alone(monkeypatch):
    monkeypatch.setattr(sys, "executable", "python")
    assert install_command("a", "b") == "python -m pip install a b"
    monkeypatch.setattr(sys, "flags", type("Flags", (), {"no_user_site": 1}))
    assert install_command("a") == "python -s -m pip install a"
