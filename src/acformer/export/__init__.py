"""A model for those who do not have this package: its code beside its weights, or its vision half as one graph."""
