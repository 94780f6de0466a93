"""The measured effects of the recipes: the runner (`python -m evidence`), the results and the pages made of them."""
