"""What things cost: each part of a model and each step of its life, timed side by side, with the roofline beside it."""
