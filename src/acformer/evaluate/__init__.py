"""Answering data sets and scoring the answers."""
