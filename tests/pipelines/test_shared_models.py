"""A method stays with its model: whatever wraps, shares or copies it, the pictures are the same, or it is an error."""

import copy
import pickle
import threading

import accelerate
import pytest
import torch
from contracts.membranes import strong
from contracts.token_merging import away
from diffusers import AutoPipelineForImage2Image, StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.pipelines.handle import Handle
from semiperm.pipelines.hooks import listeners_of
from semiperm.pipelines.membranes.apply import apply_membranes, remove_membranes
from semiperm.pipelines.text import token_ids, wordings
from semiperm.pipelines.token_merging.apply import remove_negative_token_merging
from tiny_models import build, call

NAMES, OTHER = "a photo of a robot", "a painting of a house"


def membranes(pipe, **settings):
    return apply_membranes(pipe, strong(pipe), MembraneConfig(**({"gate": "always"} | settings)))


METHODS = {"membranes": (membranes, remove_membranes), "merging": (away, remove_negative_token_merging)}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def run(pipe, prompt=NAMES, **kwargs):
    return call(pipe, [prompt], negative_prompt=["a cat"], **kwargs)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


# ---- offloading ------------------------------------------------------------------------------------------------------


def sequential(pipe):
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):  # what enable_sequential_cpu_offload does, on the CPU
        accelerate.cpu_offload(model, torch.device("cpu"))


def groups(pipe, kind):
    apply_group_offloading(
        pipe.unet,
        onload_device=torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1 if "block" in kind else None,
    )


OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": sequential,
    "group by blocks": lambda pipe: groups(pipe, "block_level"),
    "group by leaves": lambda pipe: groups(pipe, "leaf_level"),
}


@pytest.mark.parametrize("first", ["method", "offload"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_in_either_order_changes_no_picture(method, offload, first):
    apply, remove = method
    pipe = build("sd15")
    bare = [run(pipe), run(pipe, OTHER)]
    apply(pipe)
    with_method = [run(pipe), run(pipe, OTHER)]
    assert not torch.allclose(bare[0], with_method[0], atol=1e-3)
    remove(pipe)
    if first == "method":
        apply(pipe)
        OFFLOADS[offload](pipe)
    else:
        OFFLOADS[offload](pipe)
        apply(pipe)
    for _ in range(2):  # diffusers puts accelerate's hooks on anew after each run
        close(run(pipe, OTHER), with_method[1])
        close(run(pipe), with_method[0])
    remove(pipe)
    close(run(pipe), bare[0])
    close(run(pipe, OTHER), bare[1])
    pipe.remove_all_hooks()
    close(run(pipe), bare[0])


# ---- threads, pipelines and copies -----------------------------------------------------------------------------------


def sharing(pipe, cls=StableDiffusionPipeline):
    """Another pipeline on the same models, with a scheduler and a tokenizer of its own, which threads cannot share."""
    parts = {name: copy.deepcopy(getattr(pipe, name)) for name in ("scheduler", "tokenizer")}
    return cls.from_pipe(pipe, **parts)


def test_two_threads_on_one_unet(method):
    apply, _ = method
    first = build("sd15")
    second = sharing(first)
    second.set_progress_bar_config(disable=True)
    handle = apply(first)
    jobs = [(first, NAMES, 3, 5), (second, OTHER, 8, 4)]
    expected = [run(pipe, prompt, seed=seed, steps=steps) for pipe, prompt, seed, steps in jobs]
    found, failed, barrier = {}, [], threading.Barrier(2)

    def work(number):
        pipe, prompt, seed, steps = jobs[number]
        try:
            for turn in range(3):
                barrier.wait(timeout=60)
                found[number, turn] = run(pipe, prompt, seed=seed, steps=steps)
                assert len(handle.report()["steps"]) == steps, "a thread is told of its own run"
        except BaseException as error:  # a thread's errors are nobody's
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    for (number, _), picture in found.items():
        close(picture, expected[number])


def test_reading_words_leaves_the_tokenizer_as_it_was():
    pipe = build("sd15")
    pipe.tokenizer(["a cat"], padding="max_length", truncation=True, max_length=20)
    state = pipe.tokenizer.backend_tokenizer.padding, pipe.tokenizer.backend_tokenizer.truncation
    before = token_ids(pipe, ["a robot and a newword"])
    wordings(pipe, ["a robot"])
    assert (pipe.tokenizer.backend_tokenizer.padding, pipe.tokenizer.backend_tokenizer.truncation) == state
    pipe.tokenizer.add_tokens("newword")
    assert token_ids(pipe, ["a robot and a newword"]) != before, "added tokens are known"


def test_from_pipe_shares_the_method(method):
    apply, remove = method
    pipe = build("sd15")
    other = StableDiffusionPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    bare = run(other)
    handle = apply(pipe)
    expected = run(pipe)
    for _ in range(3):
        assert torch.equal(run(other), expected)
        report = handle.report()
        assert len(report["steps"]) == 2 and len(report["rows"]) == 2, "each run has a record of its own"
        assert sorted(row["kind"] for row in report["rows"]) == ["negative", "positive"]
    unguided = run(other, guidance_scale=1.0)
    assert torch.equal(unguided, run(pipe, guidance_scale=1.0))
    remove(other)
    assert torch.equal(run(pipe), bare) and torch.equal(run(other), bare)


def test_from_pipe_made_after(method):
    apply, remove = method
    pipe = build("sd15")
    bare = run(pipe)
    apply(pipe)
    image = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(image).__name__ == "StableDiffusionImg2ImgPipeline" and image.unet is pipe.unet
    again = StableDiffusionPipeline.from_pipe(image)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again), run(pipe))
    remove(pipe)
    assert torch.equal(run(again), bare)


def unpickled(pipe):
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, unpickled], ids=["copy", "deepcopy", "pickle"])
def test_copies_carry_the_method(method, make):
    apply, remove = method
    pipe = build("sd15")
    bare = run(pipe)
    handle = apply(pipe)
    expected = run(pipe)
    other = make(pipe)
    assert type(other).__name__ == type(pipe).__name__
    assert torch.equal(run(other), expected)
    held = type(handle).on(other)
    assert held.report()["rows"] and listeners_of(other) == [held]
    assert (held is handle) == (other.unet is pipe.unet)
    if held is not handle:
        remove(other)
        assert torch.equal(run(other), bare) and torch.equal(run(pipe), expected), "each has its own"
        assert listeners_of(other) == [] and "forward" not in vars(other.unet)
    remove(pipe)
    assert torch.equal(run(pipe), bare)


def test_a_copied_unet_carries_the_method(method):
    apply, remove = method
    pipe = build("sd15")
    handle = apply(pipe)
    expected = run(pipe)
    copied = copy.deepcopy(pipe.unet)
    held = getattr(copied, type(handle).NAME)
    assert held is not handle and held.denoiser is copied
    size = len(pickle.dumps(pipe.unet))
    assert size < 2 * len(pickle.dumps(build("sd15").unet)), "the rest of the pipeline does not come along"
    pipe.unet = copied
    apply(pipe)
    assert torch.equal(run(pipe), expected)


# ---- what is refused, and leaves no trace ----------------------------------------------------------------------------


def test_a_root_that_did_not_run_is_an_error_during_the_call(method):
    apply, _ = method
    pipe = build("sd15")
    handle = apply(pipe)
    vars(pipe.unet).pop("_call_impl")  # whatever goes by the denoiser's own call
    with pytest.raises(handle.ERROR, match="before its denoiser"):
        run(pipe)


def test_a_replaced_unet_takes_the_method_anew(method):
    apply, _ = method
    pipe, other = build("sd15"), build("sd15", seed=1)
    handle, mine = apply(pipe), pipe.unet
    pipe.unet = other.unet
    with pytest.raises(handle.ERROR, match="was replaced"):
        run(pipe)
    apply(pipe)
    expected = run(pipe)
    pipe.unet = mine
    with pytest.raises(handle.ERROR, match="was replaced"):
        run(pipe)
    apply(pipe)
    run(pipe)
    pipe.unet = other.unet
    apply(pipe)
    assert torch.equal(run(pipe), expected)


def traces(pipe):
    modules = {name: set(vars(module)) for name, module in pipe.unet.named_modules()}
    return modules | {"pipe": set(vars(pipe)), "ears": len(pipe.text_encoder._forward_hooks)}


def test_a_failed_apply_leaves_no_trace(method, monkeypatch):
    """Neither where there was nothing before, nor of itself where there was something."""
    apply, remove = method
    pipe = build("sd15")
    bare, before = run(pipe), traces(pipe)

    def fail_once(self, *_):
        monkeypatch.undo()
        raise OSError("interrupted")

    monkeypatch.setattr(Handle, "_attend", fail_once)
    with pytest.raises(OSError, match="interrupted"):
        apply(pipe)
    assert traces(pipe) == before and torch.equal(run(pipe), bare)
    apply(pipe)
    expected, during = run(pipe), traces(pipe)
    monkeypatch.setattr(Handle, "_attend", fail_once)
    with pytest.raises(OSError, match="interrupted"):
        apply(pipe)
    assert traces(pipe) == during and torch.equal(run(pipe), expected)
    remove(pipe)
    assert traces(pipe) == before
