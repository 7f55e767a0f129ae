"""Where the command `dist-infer` starts: before anything of ours is imported, the guard looks whether it is ours."""

from __future__ import annotations

import sys

from launch.root_guard import find_intruder


def main() -> None:
    """Ends like `launch.cli.main`, with its exit codes."""
    if (intruder := find_intruder()) is not None:
        print(f"error: {intruder}", file=sys.stderr)
        sys.exit(2)
    try:
        from launch.cli import main as run_command_line
    except KeyboardInterrupt:  # from here on the commands take care of it
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run_command_line()


if __name__ == "__main__":
    main()
