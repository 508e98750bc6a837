"""The paper's figures: `layers` and `pca` make Fig. 2, 4 and 6, `reading` Fig. 5; `write` makes files of them."""
