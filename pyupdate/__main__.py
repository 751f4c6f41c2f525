# SPDX-License-Identifier: Apache-2.0
"""``python -m pyupdate``: what can run here, what cannot and why; ``--json``, ``--selftest``.

``python -m pyupdate bench`` measures for a minute what it brings on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence

from . import info


def main(
    arguments: Sequence[str] | None = None,
    killers: Callable[[], Mapping[str, str] | None] = lambda: None,
) -> int:
    """Run the doctor.

    Args:
        arguments: the command line after the program's name; None for this process's.
        killers: finds the imports that kill a process; by default the report does.

    Returns:
        The exit status: 1 where the self-test failed or could test nothing, else 0.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["bench"]:
        return _bench(given[1:])
    parser = argparse.ArgumentParser(
        prog="python -m pyupdate",
        description="Shows what pyupdate can run here, and why not.",
        epilog="python -m pyupdate bench: a minute's benchmark of this machine (see bench --help).",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="run one step per back end and rule against the numpy oracles; exit 1 on a failure",
    )
    chosen = parser.parse_args(given)

    report = info.report(killers())
    passed = True
    if not chosen.json:
        sys.stdout.write(info.as_text(report))
    if chosen.selftest:
        passed = _selftest(report, quiet=chosen.json)
    if chosen.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0 if passed else 1


def _bench(arguments: Sequence[str]) -> int:
    try:
        from .bench import command
    except ImportError as error:
        sys.stderr.write(
            f"python -m pyupdate bench needs torch: {error}. python -m pyupdate says more\n"
        )
        return 1
    return command.main(arguments)


def _selftest(report: dict[str, object], *, quiet: bool) -> bool:
    """Whether every line of the self-test passed; the lines go to stdout, or into the report."""
    try:
        from . import selftest
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the doctor's answer, not its end
        message = f"the self-test cannot run: {type(error).__name__}: {error}"
        report["selftest"] = {"passed": False, "error": message}
        if not quiet:
            sys.stdout.write(f"\nself-test: FAILED: {message}\n")
        return False
    if not quiet:
        sys.stdout.write(f"\n{selftest.PROMISE}\n")
    results = []
    for result in selftest.run():
        results.append(result)
        if not quiet:
            sys.stdout.write(f"  {result.line()}\n")
            sys.stdout.flush()
    ran = [result for result in results if result.passed is not None]
    failed = [result for result in ran if not result.passed]
    passed = bool(ran) and not failed and report["backend"] is not None
    if not quiet:
        verdict = "passed" if passed else "FAILED"
        right = f"{len(ran) - len(failed)} of {len(ran)} are right"
        if report["backend"] is None:
            problems = report["problems"]
            assert isinstance(problems, dict)
            why = problems.get("back end in force", "no back end steps parameters on the CPU here")
            right += f", but {why}"
        sys.stdout.write(f"self-test: {verdict}: {right}\n")
    report["selftest"] = {"passed": passed, "results": [result.as_dict() for result in results]}
    return passed


if __name__ == "__main__":
    sys.exit(main(killers=info.in_a_child))
