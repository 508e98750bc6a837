"""The paper's figures: `layers` and `pca` make Fig. 2, 4 and 6, `answer_attention` Fig. 5; `write` makes the files."""
