"""What is said on the screen of who launches."""

import sys


def tell(message: str) -> None:
    """One line of this package's own; `aligner.console.say` is for runs, and imports NeMo."""
    print(f"[align] {message}", file=sys.stderr, flush=True)
