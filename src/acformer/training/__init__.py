"""Two-stage training (Sec. 4.1): a recipe, its stages, the trainer."""
