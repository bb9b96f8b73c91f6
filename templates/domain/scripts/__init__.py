"""Scripts to distill and evaluate, with a recipe."""
