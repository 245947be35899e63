import pytest


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    """The running ComfyUI (comfy_server.ComfyServer), started once for all tests."""
    from comfy_server import ComfyServer

    server = ComfyServer(tmp_path_factory.mktemp("comfyui"))
    yield server
    server.stop()
