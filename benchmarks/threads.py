"""Threads of the demo's model on a CPU, alone and beside another busy program, in one sitting.

    python benchmarks/threads.py [--repeats 2] [--steps 40]

A step's work is the same on any number of threads, so the bound of two threads is twice the speed of one. Each line is
the median step of runs in turns: a thread per core as OpenMP has it, a thread per core that sleeps while it waits
(`OMP_WAIT_POLICY=PASSIVE`), and one thread, which a run of a small model chooses itself.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from aligner.common.run_folder import read_metrics

CORES = os.cpu_count() or 1
SETTINGS = {
    "a thread per core": {"OMP_NUM_THREADS": str(CORES)},
    "a thread per core, passive": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def step_times(environment: dict[str, str], steps: int) -> list[float]:
    """Seconds of each step but the first of one run."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["resume.init_stage=None", f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
        command = [str(Path(sys.executable).parent / "nemo"), "llm", "align", "--factory", "tiny_dpo", "-y", *settings]
        env = os.environ | environment
        subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, timeout=3600)
        rows = read_metrics(Path(folder) / "runs/tiny_dpo/metrics.csv")
        return [row["train/step_time"] for row in rows if "train/step_time" in row][1:]


def main(repeats: int, steps: int) -> None:
    print(f"{CORES} cores; load before: {os.getloadavg()[0]:.1f}")
    for beside in (0, 1):
        times: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for _ in range(repeats):
            for name, environment in SETTINGS.items():
                busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
                try:
                    times[name] += step_times(environment, steps)
                finally:
                    for process in busy:
                        process.kill()
                        process.wait()
        print(f"beside {beside} busy programs")
        one = statistics.median(times["one thread"])
        for name, seconds in times.items():
            median = statistics.median(seconds)
            print(f"  {name:<28}{1 / median:>6.2f} steps/s, {one / median:.2f} of one thread's speed", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    main(**vars(parser.parse_args()))
