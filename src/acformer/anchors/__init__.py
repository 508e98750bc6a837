"""Which patches stand for an image: the progressive search of the paper, and its rivals."""
