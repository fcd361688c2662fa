"""How much processor time do `ftadvisor --help` and a plan of a scenario take?

    python benchmarks/startup.py [--runs 9]

Goes in: the installed command. Comes out: a table of CPU-seconds, median and worst.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SCENARIO = """
hardware: {accelerator: RTX 3060}
model: auto
datasets: [{kind: instruction, rows: 6000, mean_tokens: 350, languages: [en, fr]}]
goal: {text: write poems in several languages, deploy: local}
"""
LIMITS = {"--help": 0.15, "plan --scenario": 0.4}


def cpu_seconds(arguments: list[str]) -> float:
    """Return the user and system time of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "advisor", *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Measure both commands; exit 1 when a median is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        scenario = Path(folder) / "scenario.yaml"
        scenario.write_text(SCENARIO)
        commands = {
            "--help": ["--help"],
            "plan --scenario": ["plan", "--scenario", str(scenario), "--dry-run", "--json"],
        }
        print("| command | median CPU-s | worst | limit |\n|---|---|---|---|")
        for name, arguments in commands.items():
            times = [cpu_seconds(arguments) for _ in range(runs)]
            median = statistics.median(times)
            failed |= median > LIMITS[name]
            print(f"| {name} | {median:.3f} | {max(times):.3f} | {LIMITS[name]} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
