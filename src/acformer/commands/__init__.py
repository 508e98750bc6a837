"""The commands of `acformer`, one a file: `add` says what it takes, `run` does it and returns what to print.

Their modules import nothing heavy before `run`, so that `--help` and a typo are answered at once.
"""

from acformer.commands import (
    anchors,
    ask,
    bench,
    connectors,
    demo,
    evaluate,
    fetch,
    quickstart,
    reproduce,
    stats,
    train,
    visualize,
)

COMMANDS = (
    quickstart,
    fetch,
    train,
    evaluate,
    ask,
    anchors,
    visualize,
    stats,
    demo,
    connectors,
    bench,
    reproduce,
)
