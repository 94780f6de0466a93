"""The measured effects of the recipes: the runner (`python -m evidence`), the results and the gallery made of them."""
