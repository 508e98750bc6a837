"""The commands of `acformer`, one a file: `add` says what it takes, `run` does it and returns what to print.

Their modules import nothing heavy before `run`, so that `--help` and a typo are answered at once.
"""

from acformer.commands import (
    anchors,
    ask,
    connectors,
    convert,
    evaluate,
    export,
    fetch,
    merge,
    plan,
    score,
    selectors,
    serve,
    train,
)

COMMANDS = (fetch, plan, train, convert, merge, evaluate, score, ask, serve, anchors, connectors, selectors, export)
