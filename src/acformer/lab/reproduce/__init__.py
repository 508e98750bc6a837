"""`acformer reproduce`: the paper's tables made here, every row trained under one recipe, intervals over seeds.

`plans` says what a table is, `run_plan` makes it; between them `runs` (what to train), `execute` and `schedule` (doing
it), `records` (what it leaves), `measured`, `pairs`, `tables` and `plot_scores` (what it comes to). `train_probe` and
`probe_pretraining`: scales without a language model, or with a small one.
"""
