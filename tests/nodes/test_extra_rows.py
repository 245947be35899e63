"""Extra rows beside a batch in ComfyUI: what the forward is given, and what it gives back. Without ComfyUI."""

import torch
from semiperm.nodes.extra_rows import ExtraRows, call_with_rows, rows_of, with_rows


def test_everything_with_a_row_an_image_is_extended():
    row = torch.arange(4.0)[:, None]
    value = {"a": row, "b": [row[:2], (row, "text")], "c": torch.tensor(4.0), "d": None}
    more = with_rows(value, 4, [3, 0])
    assert more["a"].flatten().tolist() == more["b"][1][0].flatten().tolist() == [0, 1, 2, 3, 3, 0]
    assert more["b"][0] is value["b"][0] and more["b"][1][1] == "text" and more["c"] is value["c"]


def call(extra, options, **kwargs):
    seen = {}

    def forward(x, timesteps, context=None, y=None, transformer_options=None):
        seen.update(x=x, timesteps=timesteps, context=context, y=y, options=transformer_options)
        return x * 2

    x, context = torch.arange(4.0)[:, None], torch.arange(8.0).reshape(4, 2, 1)
    out = call_with_rows(forward, x, (x[:, 0], context), kwargs | {"transformer_options": options}, extra)
    assert torch.equal(out, x * 2)
    return seen


def test_added_rows_take_their_sources_inputs_and_are_cut_off_again():
    options = {"cond_or_uncond": [1, 0], "uuids": ["n", "p"], "sigmas": torch.ones(1)}
    seen = call(ExtraRows([2, 3]), options, y=torch.arange(12.0).reshape(4, 3))
    assert seen["x"].flatten().tolist() == seen["timesteps"].tolist() == [0, 1, 2, 3, 2, 3]
    assert torch.equal(seen["context"][4:], seen["context"][2:4]) and torch.equal(seen["y"][4:], seen["y"][2:4])
    assert seen["options"]["cond_or_uncond"] == [1, 0, 0] and seen["options"]["uuids"] == ["n", "p", "p"]
    rows = rows_of(seen["x"], seen["options"])
    assert (rows.sampled, rows.chunks, rows.total) == (4, [1, 0], 6) and rows.each == 2
    assert options["cond_or_uncond"] == [1, 0] and rows_of(seen["x"][:4], options) == (4, [1, 0], 4)
    # a second method's rows come behind: counted from what the sampler sent
    again = call(ExtraRows([0]), seen["options"])
    assert rows_of(again["x"], again["options"]) == (4, [1, 0], 5)
    assert again["options"]["cond_or_uncond"] == [1, 0, 0]  # one row is no whole chunk


def test_rows_of_their_own():
    extra = ExtraRows([3], torch.full((1, 1), 9.0), torch.full((1, 2, 1), 7.0), torch.full((1, 2), 5.0))
    seen = call(extra, {}, y=torch.zeros(4, 3))
    assert seen["x"][4] == 9 and seen["timesteps"][4] == 3 and (seen["context"][4:] == 7).all()
    assert seen["y"][4].tolist() == [5, 5, 0] and not seen["y"][:4].any()


def test_without_rows_every_input_is_the_same_object():
    context = torch.zeros(4, 2, 1)
    seen = call(ExtraRows([]), {}, y=context)
    assert seen["y"] is context and rows_of(seen["x"], seen["options"]).total == 4
