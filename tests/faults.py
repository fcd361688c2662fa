"""Programs that fail on purpose: a shipped training program with one fault put into it.

Goes in: a folder, the program's name, the fault as lines of Python. Comes out: a folder of programs that
stands in for recipes/. The process, the trainer, the checkpoints and the libraries are the real ones; the
shipped code has no switch for it. Never does: import torch here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from advisor.resources import recipes_dir

HEAD = '''"""The shipped program with a fault put into it."""
import sys
from pathlib import Path
SHIPPED = Path({shipped!r})
if not any(word in Path(sys.argv[-1]).read_bytes() for word in (b"qlora", b"8bit")):
    sys.modules["bitsandbytes"] = None
import advisor.train.callbacks as callbacks
from advisor.train.process import StopRequest
import yaml
RECIPE = yaml.safe_load(Path(sys.argv[1]).read_text())
SET = RECIPE["settings"]
ATTEMPT = (RECIPE.get("lineage") or {{"attempt": 1}})["attempt"]
begin, log, save = callbacks.Reporter.on_step_begin, callbacks.Reporter.on_log, callbacks.Reporter.on_save
def at_step(reporter, args, state, control, **rest):
    step = state.global_step + 1
{at_step}
    return begin(reporter, args, state, control, **rest)
def at_log(reporter, args, state, control, logs, **rest):
    step = state.global_step
{at_log}
    return log(reporter, args, state, control, logs, **rest)
def at_save(reporter, args, state, control, **rest):
    step = state.global_step
{at_save}
    return save(reporter, args, state, control, **rest)
callbacks.Reporter.on_step_begin, callbacks.Reporter.on_log = at_step, at_log
callbacks.Reporter.on_save = at_save
source = compile(SHIPPED.read_text(), str(SHIPPED), "exec")
exec(source, {{"__name__": "__main__", "__file__": str(SHIPPED)}})
'''
OUT_OF_MEMORY = 'raise MemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (put there by a test)")'


def faulty(
    place: Path, program: str, *, at_step: str = "pass", at_log: str = "pass", at_save: str = "pass"
) -> Path:
    """Write the program with its fault and return the folder that stands in for recipes/.

    Args:
        place: an empty folder.
        program: its id, for example sft.
        at_step: lines run before each step, with `step`, `SET` (settings), `ATTEMPT` and `RECIPE` known.
        at_log: lines run when a step is told, with `logs` too.
        at_save: lines run when a checkpoint was written but not completed yet, with `args` too.
    """
    target = place / "recipes" / program
    target.mkdir(parents=True, exist_ok=True)
    shipped = recipes_dir() / program
    shutil.copy(shipped / "program.toml", target)
    parts = {"at_step": at_step, "at_log": at_log, "at_save": at_save}
    indented = {name: "\n".join(f"    {line}" for line in text.splitlines()) for name, text in parts.items()}
    (target / "train.py").write_text(HEAD.format(shipped=str(shipped / "train.py"), **indented))
    return place / "recipes"
