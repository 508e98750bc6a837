"""From files to batches: `sources` reads samples, `conversation` makes ids and labels, `collate` batches."""
