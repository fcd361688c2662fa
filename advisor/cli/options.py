"""The options that several commands share, so that each is described once.

Goes in: nothing. Comes out: annotated types for typer, and the `Inputs` made of the planning options.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from advisor.intake import Inputs, parse_setting

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network; the cache must do.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write into.", show_default=False)]
Model = Annotated[
    str,
    typer.Option("--model", help="Hub id, local folder, `starter` (the embedded model) or `auto`."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data", help="File, folder or hub id; repeatable; name=path names a task.", show_default=False
    ),
]
GoalText = Annotated[
    str, typer.Option("--goal", help="What you want, in your own words.", show_default=False)
]
Deploy = Annotated[
    str,
    typer.Option(
        "--deploy", help="Where it must run afterwards, for example 'laptop, Ollama'.", show_default=False
    ),
]
Commercial = Annotated[
    bool | None,
    typer.Option("--commercial/--no-commercial", help="Will it be used commercially?", show_default=False),
]
MustNotForget = Annotated[
    bool, typer.Option("--must-not-forget", help="What the model can do now must not get worse.")
]
MaxHours = Annotated[
    float | None, typer.Option("--max-hours", help="Longest time that training may take.", show_default=False)
]
Method = Annotated[
    str | None,
    typer.Option("--method", help="Insist on a method, for example lora, qlora, full.", show_default=False),
]
HardwareOption = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        help="Plan for another machine: 'RTX 3060', '8xH100', 'none', FILE.yaml.",
        show_default=False,
    ),
]
ScenarioFile = Annotated[
    str | None,
    typer.Option(
        "--scenario", help="YAML file that declares machine, model, data, goal.", show_default=False
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a setting: --set max_steps=50; repeatable.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Do what --method asks even where it is not advised.")]


def inputs_of(
    *,
    model: str = "auto",
    data: list[str] | None = None,
    goal: str = "",
    deploy: str = "",
    commercial: bool | None = None,
    must_not_forget: bool = False,
    max_hours: float | None = None,
    method: str | None = None,
    hardware: str | None = None,
    scenario: str | None = None,
    settings: list[str] | None = None,
    offline: bool = False,
    force: bool = False,
    out: Path | None = None,
) -> Inputs:
    """Return the planning options as one record; `--set` texts are parsed."""
    return Inputs(
        model=model,
        data=tuple(data or ()),
        goal=goal,
        deploy=deploy,
        commercial=commercial,
        must_not_forget=must_not_forget,
        max_hours=max_hours,
        method=method,
        hardware=hardware,
        scenario=scenario,
        settings=dict(parse_setting(text) for text in settings or ()),
        offline=offline,
        force=force,
        out=str(out) if out else None,
    )
