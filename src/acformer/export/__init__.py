"""A model to share: its code beside its weights, its vision half as one graph, what was trained of it alone."""
