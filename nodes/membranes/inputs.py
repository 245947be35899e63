"""What several membrane nodes have in common."""

from comfy_api.latest import io

from ..sockets import MembranesIO

CATEGORY = "semiperm/membranes"


def strength_input() -> io.Input:
    return io.Float.Input(
        "strength",
        default=1.0,
        min=-2.0,
        max=4.0,
        step=0.05,
        tooltip="How far an open membrane moves the model. 1 is as made, 0 is exactly the untouched model, below 0"
        " pushes towards the concept.",
    )


def concept_inputs() -> list[io.Input]:
    """The inputs that say what to erase."""
    return [
        io.String.Input(
            "concept",
            multiline=True,
            default="",
            placeholder="one concept per line; other words for it behind |",
            tooltip="What to erase, one concept per line. Write other words for the same thing behind a bar:"
            " robot|android",
        ),
        io.String.Input(
            "surrogate",
            default="",
            tooltip="What the model should see instead, for all lines, such as 'a person'. Empty: nothing in"
            " particular.",
        ),
    ]


def lines_input(name: str, placeholder: str, tooltip: str) -> io.Input:
    """Texts of the user's own, one per line; none where a general list serves."""
    return io.String.Input(
        name, optional=True, multiline=True, default="", placeholder=f"{placeholder}, one per line", tooltip=tooltip
    )


def membranes_output() -> MembranesIO.Output:
    """The membranes that a node makes."""
    return MembranesIO.Output(
        "made",
        display_name="membranes",
        tooltip="One membrane for each line, for Apply Membranes, Save Membrane or Load Membrane's stack.",
    )
