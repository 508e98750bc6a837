"""`openmoji-scenes`: pictures of emoji and printed words, with questions in the families of the paper's benchmarks.

A scene is a pure function of the data set's version, the level, the split and its number: nothing is downloaded but
a font and a few photographs, nothing is drawn before it is asked for, and everybody has the same pictures.
The way: `layout` (what is where) -> `draw` (the picture) and `questions`, `captions` (what is said about it)
-> `dataset` (samples, as of any other data set).
"""
