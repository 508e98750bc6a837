"""`openmoji-scenes`: images of emoji and printed words, with questions in the families of the paper's benchmarks.

A scene is a pure function of the data set's version, its difficulty, the split and its number: nothing is downloaded
but a font and a few photographs, nothing is drawn before it is asked for, and everybody has the same images.
The way: `layout` (what is where) -> `draw` (the image) and `questions`, `captions` (what is said about it)
-> `dataset` (samples, as of any other data set). `targets`, `probe`, `answers`, `prior`: the same questions answered
from the visual tokens by a small probe in place of a language model.
"""
